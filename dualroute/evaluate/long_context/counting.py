"""Variable tracking, common words, frequent words: what has to be gathered from all over a text."""

from __future__ import annotations

import math
import random
import string
from functools import partial
from itertools import pairwise

from dualroute.evaluate.long_context.sample import NOISE, Sample, Task, scattered
from dualroute.evaluate.long_context.words import letters, number, words

HOPS = 4  # assignments that pass a value on
COMMON = 10  # words that are asked for
_CHAINS = (
    "Memorize and track the chain(s) of variable assignment hidden in the following "
    "text.\n\n{context}\nQuestion: Find all variables that are assigned the value {query} in the text "
    "above. Answer: According to the chain(s) of variable assignment in the text above, {count} variables "
    "are assigned the value {query}, they are: "
)
_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
    "ones that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above "
    "list? Answer: The top 10 words that appear most often in the list are:"
)
_FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore "
    "the dots '....'. What are the three most frequently appeared words in the above coded text? Answer: "
    "According to the coded text above, the three most frequently appeared words are:"
)


def variable_task() -> Task:
    """A value that is handed on from variable to variable; an example with short names stands before."""
    return Task(_variables, new_tokens=30)


def _variables(count: int, draw: random.Random) -> Sample:
    example, names, _ = _chain(3, draw, letters_of_a_name=3)
    text, found, depth = _chain(count, draw)
    return Sample(f"{example}{' '.join(names)}\n\n\n{text}".rstrip(), found, depth)


def _chain(count: int, draw: random.Random, letters_of_a_name: int = 5) -> tuple[str, list[str], float]:
    """The text of a chain in so much noise, its variables, and where the last assignment stands."""
    names: list[str] = []
    while len(names) <= HOPS:
        name = letters(draw, letters_of_a_name, string.ascii_uppercase)
        names += [name] * (name not in names)
    value = number(draw, 5)
    handed = [f"VAR {new} = VAR {old}" for old, new in pairwise(names)]
    pieces, depth = scattered([NOISE] * count, [f"VAR {names[0]} = {value}", *handed], draw)
    return _CHAINS.format(context="\n".join(pieces), query=value, count=HOPS + 1), names, depth


def common_words_task(length: int) -> Task:
    """Ten words that stand oftener in a list than the others; as in RULER, less often in a short one."""
    often, seldom, example = (6, 1, (20, 3, 1)) if length < 4096 else (30, 3, (40, 10, 3))
    return Task(partial(_common_words, often, seldom, example), new_tokens=120, least=COMMON + 1)


def _common_words(
    often: int, seldom: int, example: tuple[int, int, int], count: int, draw: random.Random
) -> Sample:
    shown, theirs = _listed(*example, draw)
    asked, answers = _listed(count, often, seldom, draw)
    numbered = " ".join(f"{place}. {word}" for place, word in enumerate(theirs, 1))
    text = f"{_COMMON.format(context=shown)} {numbered}\n{_COMMON.format(context=asked)}"
    return Sample(text, answers)


def _listed(count: int, often: int, seldom: int, draw: random.Random) -> tuple[str, list[str]]:
    chosen = words(draw, count)
    common = chosen[:COMMON]
    listed = common * often + chosen[COMMON:] * seldom
    draw.shuffle(listed)
    return " ".join(f"{place}. {word}" for place, word in enumerate(listed, 1)), common


def frequent_words_task(length: int) -> Task:
    """Coded words whose frequencies fall as 1 / rank²; the most frequent is a mark that does not count."""
    return Task(partial(_frequent_words, max(length // 50, 8)), new_tokens=50, least=80)


def _frequent_words(vocabulary: int, count: int, draw: random.Random) -> Sample:
    coded: dict[str, None] = {"...": None}
    while len(coded) < vocabulary:
        coded[letters(draw, 6)] = None
    zeta = math.pi**2 / 6
    text = [word for rank, word in enumerate(coded, 1) for _ in range(int(count / rank**2 / zeta))]
    draw.shuffle(text)
    return Sample(_FREQUENT.format(context=" ".join(text)), list(coded)[1:4])
