"""A permutation that is computed instead of stored: element by element, from keys, in constant memory.

In: keys from a seed. Out: the image of any index, to `plan`, which visits the windows of an epoch in this
order. With a `Shuffle` it is random among neighbours of several places at a time, so that what is read
meanwhile lies in few shards.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 8  # of the Feistel network


def seeded_words(*parts: object, count: int) -> NDArray[np.uint64]:
    """``count`` 64-bit words from SHA-256 of ``parts``: independent of platform, Python and numpy version."""
    prefix = "|".join(map(str, ("dualroute-plan-1", *parts)))
    digests = (hashlib.sha256(f"{prefix}|{number}".encode()).digest() for number in range(-(-count // 4)))
    return np.frombuffer(b"".join(digests), dtype="<u8")[:count].astype(np.uint64)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(indices: ArrayLike, size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Images of ``indices`` under a pseudo-random permutation of [0, size) given by the round ``keys``.

    A Feistel network over Z_a x Z_b with a = ceil(sqrt(size)), b = ceil(size / a), and cycle walking: results
    outside [0, size) are sent through again (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
    Since a * b - size < a, hardly any are.

    Raises:
        ValueError: an index outside [0, size).
    """
    result = np.array(indices, dtype=np.int64, ndmin=1).astype(np.uint64)
    if result.size and int(result.max()) >= size:  # negative indices are huge as uint64
        raise ValueError(f"index outside [0, {size})")
    rows = math.isqrt(max(size - 1, 0)) + 1
    a, b = np.uint64(rows), np.uint64(-(-size // rows))
    walking = np.arange(result.size)
    while walking.size:
        left, right = np.divmod(result[walking], b)
        for number, key in enumerate(keys):
            if number % 2 == 0:
                left = (left + mix(right + key) % a) % a
            else:
                right = (right + mix(left + key) % b) % b
        result[walking] = left * b + right
        walking = walking[result[walking] >= np.uint64(size)]
    return result.astype(np.int64)


class Shuffle(NamedTuple):
    """How far apart windows may lie in the data that are read close to one another.

    Attributes:
        tokens: among which the order is random.
        shards: of the data; windows are drawn from as many at a time as have those tokens.
    """

    tokens: int
    shards: int

    def parts(self, windows: int, context: int) -> tuple[int, int]:
        """Windows of a part, about those of a shard, and how many parts are drawn from at a time."""
        part = max(windows // max(self.shards, 1), 1)
        return part, max(self.tokens // (part * context), 1)


def visited(
    numbers: NDArray[np.int64], windows: int, *parts: object, context: int = 1, shuffle: Shuffle | None = None
) -> NDArray[np.int64]:
    """Ids of the samples with these numbers: epoch e visits its ``windows``, e · windows …, each once.

    Args:
        numbers: of samples in the run.
        parts: what keys are made of: a fingerprint, the seed, and last a label; the epoch is put before it.
        context: slots of a window.
        shuffle: null draws from all windows.
    """
    epochs, indices = np.divmod(numbers, windows)
    for epoch in np.unique(epochs):
        words = (*parts[:-1], epoch, parts[-1])
        mask = epochs == epoch
        indices[mask] = (
            permute(indices[mask], windows, seeded_words(*words, count=ROUNDS))
            if shuffle is None
            else _nearby(indices[mask], windows, words, *shuffle.parts(windows, context))
        )
    return epochs * windows + indices


def _nearby(
    indices: NDArray[np.int64], windows: int, words: tuple[object, ...], part: int, together: int
) -> NDArray[np.int64]:
    """Parts of neighbouring windows in random order, and windows in random order among ``together`` parts.

    The windows behind the last whole part are drawn with the last parts.
    """
    span = part * together
    result = np.empty_like(indices)
    for group in np.unique(indices // span):
        first = int(group) * span
        mask = indices // span == group
        keys = seeded_words(*words, "among", group, count=ROUNDS)
        result[mask] = first + permute(indices[mask] - first, min(span, windows - first), keys)
    places, within = np.divmod(result, part)
    whole = places < windows // part
    keys = seeded_words(*words, "parts", count=ROUNDS)
    places[whole] = permute(places[whole], windows // part, keys)
    return places * part + within
