"""Needles in a haystack: RULER's eight configurations, and passkey.

A needle says a value of a key ("One of the special magic numbers for brave-otter is: 7301845."); the question
names keys and wants their values.  Configurations differ in what the haystack is (a repeated sentence, a
text, other needles) and in how many needles there are for a key and how many keys are asked for.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Literal

from dualroute.evaluate.long_context.sample import NOISE, Sample, Task, scattered
from dualroute.evaluate.long_context.words import identifier, number, word

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz "
    "you about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} "
    "mentioned in the provided text? The special magic {kind} for {query} mentioned in the provided text "
    "are"
)
_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in "
    "the provided text? The special magic {kind} for {query} mentioned in the provided text is"
)
_PASSKEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will "
    "quiz you about the important information there.\n{context}\nWhat is the pass key? The pass key is"
)
_DRAWN: dict[str, Callable[[random.Random], str]] = {"words": word, "numbers": number, "uuids": identifier}


@dataclass(frozen=True)
class Configuration:
    """One of RULER's.

    Attributes:
        haystack: noise (a repeated sentence), text, or needle (more needles, of keys that nobody asks for).
        keys, values: What they are.
        num_keys, num_values, num_queries: Keys in the text, values of each, keys that are asked for.
    """

    haystack: Literal["noise", "text", "needle"]
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


CONFIGURATIONS = {
    "niah_single_1": Configuration("noise"),
    "niah_single_2": Configuration("text"),
    "niah_single_3": Configuration("text", values="uuids"),
    "niah_multikey_1": Configuration("text", num_keys=4),
    "niah_multikey_2": Configuration("needle"),
    "niah_multikey_3": Configuration("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Configuration("text", num_values=4),
    "niah_multiquery": Configuration("text", num_keys=4, num_queries=4),
}


def needle_task(configuration: Configuration, text: str | None) -> Task:
    """The task of a configuration; ``text`` is the haystack of those that hide needles in a text, null the
    noise."""
    filler = sentences(text if text is not None and configuration.haystack == "text" else NOISE)
    return Task(partial(_needles, configuration, filler), new_tokens=128)


def sentences(text: str) -> list[str]:
    """A text cut behind full stops, question and exclamation marks, also Chinese ones."""
    flat = " ".join(text.split())
    return [one for one in re.split(r"(?<=[.!?]) |(?<=[。！？])", flat) if one]


def filled(filler: Sequence[str], count: int, draw: random.Random) -> list[str]:
    """``count`` consecutive pieces from anywhere in a filler, which begins again behind its end."""
    start = draw.randrange(len(filler))
    return list(islice(cycle(filler), start, start + count))


def _needles(of: Configuration, filler: Sequence[str], count: int, draw: random.Random) -> Sample:
    keys = [_DRAWN[of.keys](draw) for _ in range(of.num_keys)]
    values = [[_DRAWN[of.values](draw) for _ in range(of.num_values)] for _ in keys]
    needles = [
        _NEEDLE.format(kind=of.values, key=key, value=value)
        for key, own in zip(keys, values, strict=True)
        for value in own
    ]
    draw.shuffle(needles)
    asked = draw.sample(range(of.num_keys), of.num_queries)
    if of.haystack == "needle":
        others = islice((key for key in iter(partial(_DRAWN[of.keys], draw), None) if key not in keys), count)
        pieces = [
            _NEEDLE.format(kind=of.values, key=key, value=_DRAWN[of.values](draw)) for key in list(others)
        ]
    else:
        pieces = filled(filler, count, draw)
    pieces, depth = scattered(pieces, needles, draw)
    queries = [keys[k] for k in asked]
    query = queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
    one = of.num_queries * of.num_values == 1
    text = (_ONE if one else _TEMPLATE).format(
        kind=of.values[:-1] if one else of.values, context=_joined(pieces, of.haystack), query=query
    )
    return Sample(text, [value for k in asked for value in values[k]], depth if len(needles) == 1 else None)


def _joined(pieces: Sequence[str], haystack: str) -> str:
    return (" " if haystack == "text" else "\n").join(pieces)


def passkey_task() -> Task:
    """Five digits in noise (Mohtashami & Jaggi 2023, https://arxiv.org/abs/2305.16300)."""
    return Task(_passkey, new_tokens=8)


def _passkey(count: int, draw: random.Random) -> Sample:
    key = number(draw, 5)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    pieces, depth = scattered([NOISE] * count, [needle], draw)
    return Sample(_PASSKEY.format(context=" ".join(pieces)), [key], depth)
