"""A permutation that is computed instead of stored: element by element, from keys, in constant memory.

In: keys from a seed. Out: the image of any index, to `plan`, which visits the windows of an epoch in this
order. With a `Shuffle` it is random among neighbours of several places at a time, so that what is read
meanwhile lies in few shards.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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


@dataclass(frozen=True, eq=False)
class Shuffle:
    """How far apart windows may lie in the data that are read close to one another.

    Windows are drawn from whole shards, in a random order of these, as many at a time as have ``tokens``.

    Attributes:
        tokens: among which the order is random.
        shards: (shards,) tokens of each, in the order of the data.
    """

    tokens: int
    shards: Sequence[int]

    @cached_property
    def _layouts(self) -> OrderedDict[tuple[object, ...], _Layout]:
        return OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"tokens": self.tokens, "shards": self.shards}

    def layout(self, windows: int, words: tuple[object, ...]) -> _Layout:
        """The order of an epoch of ``windows`` whose keys are made of ``words``."""
        key = (windows, *words)
        if key not in self._layouts:
            self._layouts[key] = self._laid(windows, words)
            if len(self._layouts) > 2:
                self._layouts.popitem(last=False)
        return self._layouts[key]

    def _laid(self, windows: int, words: tuple[object, ...]) -> _Layout:
        before = np.concatenate([[0], np.cumsum(np.asarray(self.shards, dtype=np.float64))])
        bounds = np.floor(before / before[-1] * windows + 0.5).astype(np.int64)
        keys = seeded_words(*words, "shards", count=ROUNDS)
        order = permute(np.arange(len(self.shards)), len(self.shards), keys)
        first = np.concatenate([[0], np.cumsum(np.diff(bounds)[order])])
        groups, held = [0], 0
        for place, shard in enumerate(order.tolist()):
            if held and held + self.shards[shard] > self.tokens:
                groups.append(int(first[place]))
                held = 0
            held += self.shards[shard]
        return _Layout(bounds[order], first, np.array([*groups, windows], dtype=np.int64))


class _Layout(NamedTuple):
    """Attributes: the first window of each shard, shards in the order of the epoch; (shards + 1,) windows
    before each of them in that order; (groups + 1,) the same of the groups that windows are drawn from."""

    windows: NDArray[np.int64]
    first: NDArray[np.int64]
    groups: NDArray[np.int64]


def visited(
    numbers: NDArray[np.int64], windows: int, *parts: object, shuffle: Shuffle | None = None
) -> NDArray[np.int64]:
    """Ids of the samples with these numbers: epoch e visits its ``windows``, e · windows …, each once.

    Args:
        numbers: of samples in the run.
        parts: what keys are made of: a fingerprint, the seed, and last a label; the epoch is put before it.
        shuffle: null draws from all windows.
    """
    epochs, indices = np.divmod(numbers, windows)
    for epoch in np.unique(epochs):
        words = (*parts[:-1], epoch, parts[-1])
        mask = epochs == epoch
        indices[mask] = (
            permute(indices[mask], windows, seeded_words(*words, count=ROUNDS))
            if shuffle is None
            else _nearby(indices[mask], shuffle.layout(windows, words), words)
        )
    return epochs * windows + indices


def _nearby(indices: NDArray[np.int64], layout: _Layout, words: tuple[object, ...]) -> NDArray[np.int64]:
    """Windows at these places of an epoch: in random order within each group of shards."""
    result = np.empty_like(indices)
    groups = np.searchsorted(layout.groups, indices, side="right") - 1
    for group in np.unique(groups):
        first, end = layout.groups[group : group + 2].tolist()
        mask = groups == group
        keys = seeded_words(*words, "among", group, count=ROUNDS)
        result[mask] = first + permute(indices[mask] - first, end - first, keys)
    shards = np.searchsorted(layout.first, result, side="right") - 1
    return layout.windows[shards] + result - layout.first[shards]
