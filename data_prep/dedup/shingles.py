"""A text as a set of hashes that does not ask for white space.

In: the text of a document.  Out: the hash of every run of ``size`` tokens, to `signatures` (near
duplicates) and to `cleaning.contamination` (n-grams of evaluation sets).

A token is a run of letters, marks and digits of a script that writes spaces, or one letter of a script that
does not (Han, kana, Thai, Lao, Khmer, Burmese, Tibetan). Case, punctuation and white space are no part of
it, so that a text is the same after it was wrapped or indented anew.

All of it is a few passes of numpy over the code points: a token's hash is the difference of two prefix sums
of a polynomial, so no token becomes a Python string.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

BLOCK = 1 << 18  # characters at a time
_BASE = 0x9E3779B97F4A7C15
_SPACED, _UNSPACED = 1, 2
_UNSPACED_RANGES = (
    (0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021,
    0x3029), (0x3031, 0x3035), (0x3040, 0x30FF), (0x31A0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F), (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x1AFF0, 0x1B16F), (0x20000,
    0x323AF),
)  # fmt: skip


@functools.cache
def _classes() -> NDArray[np.uint8]:
    """For each code point: 0 between tokens, 1 part of a token, 2 a token by itself (1,114,112)."""
    table = np.zeros(0x110000, np.uint8)
    kinds = [unicodedata.category(chr(code))[0] for code in range(0x323B0)]
    table[[code for code, kind in enumerate(kinds) if kind in "LNM"]] = _SPACED
    table[ord("_")] = _SPACED  # a name in source code is one token
    for first, last in _UNSPACED_RANGES:
        table[first : last + 1] *= _UNSPACED
    return table


@functools.cache
def _powers() -> tuple[Hashes, Hashes]:
    """Powers of the base and of its inverse modulo 2^64, from the zeroth on."""
    powers = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        steps = np.full(BLOCK + 1, base, np.uint64)
        steps[0] = 1
        powers.append(np.cumprod(steps, dtype=np.uint64))
    return powers[0], powers[1]


def mixed(values: Hashes) -> Hashes:
    """Spread the bits (the finaliser of MurmurHash3 in Stafford's 13th variant)."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def _blocks(text: str) -> Iterator[str]:
    """Pieces of a long text, cut where no token is if that is near."""
    start = 0
    while start < len(text):
        end = min(start + BLOCK, len(text))
        if end < len(text):
            space = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
            end = space + 1 if space > start + BLOCK // 2 else end
        yield text[start:end]
        start = end


def lower(text: str) -> str:
    """Lower case, if that keeps every letter in its place, as it does but for one or two."""
    lowered = text.lower()
    return lowered if len(lowered) == len(text) else text


def tokens(text: str) -> Iterator[tuple[Hashes, NDArray[np.int64], NDArray[np.bool_]]]:
    """Tokens of a text, a block at a time.

    Yields:
        (hashes, starts, unspaced): of each token its hash, the character of the text where it begins, and
        whether it is one letter of a script without spaces.
    """
    powers, inverse = _powers()
    place = 0
    for block in _blocks(text):
        codes = np.frombuffer(lower(block).encode("utf-32-le", "surrogatepass"), "<u4")
        classes = _classes()[codes]
        alone, inside = classes == _UNSPACED, classes == _SPACED
        edges = np.diff(inside.view(np.int8), prepend=0, append=0)
        starts = np.flatnonzero((edges[:-1] == 1) | alone)
        ends = np.flatnonzero((edges[1:] == -1) | alone) + 1
        sums = np.zeros(len(codes) + 1, np.uint64)
        np.cumsum((codes + np.uint64(1)) * powers[: len(codes)], out=sums[1:])
        yield mixed((sums[ends] - sums[starts]) * inverse[starts]), starts + place, alone[starts]
        place += len(block)


def shingles(text: str, size: int = 5) -> Iterator[Hashes]:
    """Hashes of every run of ``size`` tokens, block after block; of fewer tokens, one hash of them all."""
    held = np.zeros(0, np.uint64)
    found = False
    for hashes, _, _ in tokens(text):
        held = np.concatenate([held, hashes])
        if len(held) >= size:
            found = True
            yield ngrams(held, size)
            held = held[len(held) - size + 1 :]
    if not found and len(held):
        yield ngrams(held, len(held))


def ngrams(hashes: Hashes, size: int) -> Hashes:
    """Hashes of every run of ``size`` of at least as many hashes."""
    count = len(hashes) - size + 1
    total = hashes[:count].copy()
    for offset in range(1, size):
        total *= np.uint64(_BASE)
        total += hashes[offset : offset + count]
    return mixed(total)
