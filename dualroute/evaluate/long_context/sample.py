"""A text that asks for something, made as long as wanted.

In: a function that makes a text with so much filler.  Here: how much filler gives the wanted number of tokens
is found once, by bisection, and taken back a little where one text comes out longer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from dualroute.errors import UserError

#: The filler of RULER's first configuration.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


#: Texts that are drawn for each that is wanted, since one may be too long without any filler.
_DRAWS = 20


@dataclass(frozen=True)
class Sample:
    """One text.

    Attributes:
        text: It, with the beginning of the answer.
        answers: What is looked for in what the model writes.
        depth: Where the (last) needed fact stands, 0 the beginning and 1 the end; null for no such place.
    """

    text: str
    answers: list[str]
    depth: float | None = None


#: (filler, random numbers) → a text; the same numbers give the same text but for its filler.
Make = Callable[[int, random.Random], Sample]
Count = Callable[[str], int]


@dataclass(frozen=True)
class Task:
    """A kind of text.

    Attributes:
        make: Makes one.
        new_tokens: Tokens that the model may write.
        least: Filler that is needed at least.
        match: Whether all answers are looked for, or any of them is enough.
    """

    make: Make
    new_tokens: int
    least: int = 1
    match: Literal["all", "any"] = "all"


class TooShort(UserError):
    """A length leaves no room for a task."""


def samples(task: Task, length: int, count: int, seed: str, tokens: Count) -> list[Sample]:
    """``count`` texts of at most ``length`` tokens, those that are written included, and hardly less.

    Args:
        task: Their kind.
        length: In tokens.
        count: How many.
        seed: Of all of them.
        tokens: Length of a text in the model's tokens.

    Raises:
        TooShort: The length leaves no room for the task.
    """
    check_room(task, length, seed, tokens)
    room = length - task.new_tokens

    def made(number: int, filler: int) -> Sample:
        return task.make(filler, random.Random(f"{seed}/{number}"))

    def fits(number: int, filler: int) -> bool:
        return tokens(made(number, filler).text) <= room

    low, high = task.least, 2 * task.least
    while fits(0, high):
        low, high = high, 2 * high
    while high - low > max(1, low // 256):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(0, middle) else (low, middle)
    found: list[Sample] = []
    for number in range(_DRAWS * count):
        filler = low
        while not (fit := fits(number, filler)) and filler > task.least:
            filler = max(task.least, filler - max(1, filler // 100))
        if fit:
            found.append(made(number, filler))
        if len(found) == count:
            return found
    raise TooShort(f"{length} tokens are too few for most texts of this task")


def check_room(task: Task, length: int, seed: str, tokens: Count) -> None:
    """Whether a length leaves room for a task, from a text with hardly any filler.

    Raises:
        TooShort: It does not.
    """
    shortest = tokens(task.make(task.least, random.Random(f"{seed}/0")).text) + task.new_tokens
    if shortest > length:
        raise TooShort(f"{length} tokens are too few for this task, which needs {shortest}")


def matched(written: str, answers: Sequence[str], match: str) -> float:
    """RULER's score of a text: the share of the answers that stand in it, or whether any does, whatever the
    case of the letters."""
    written = written.lower()
    hits = [answer.lower() in written for answer in answers]
    return float(any(hits)) if match == "any" else sum(hits) / len(hits)


def scattered(filler: Sequence[str], needles: Sequence[str], draw: random.Random) -> tuple[list[str], float]:
    """Needles between the pieces of a filler, in their order, and the depth of the last one."""
    places = sorted(draw.randrange(len(filler) + 1) for _ in needles)
    pieces, at = [], 0
    for place, needle in zip(places, needles, strict=True):
        pieces += [*filler[at:place], needle]
        at = place
    return [*pieces, *filler[at:]], places[-1] / max(len(filler), 1)
