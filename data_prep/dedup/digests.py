"""Which texts have been seen, in little more than their digests' own size.

A Python set holds about 100 bytes for each; sorted arrays hold 16.  Digests that are new are gathered in a
small set; a full one becomes a sorted array, and arrays are merged as soon as the one before is not twice as
long, so that n digests are in at most log2(n / `GATHERED`) arrays and each is moved as often.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZE = 16  # bytes: among 10^9 texts two digests are equal by chance with probability 10^-21
GATHERED = 1 << 16


class DigestSet:
    """Digests of texts, of which the first `SIZE` bytes count."""

    def __init__(self, gathered: int = GATHERED) -> None:
        self._most = gathered
        self._new: set[bytes] = set()
        self._sorted: list[NDArray[Any]] = []  # longest first; bytes of fixed width compare as memory does

    def __len__(self) -> int:
        return len(self._new) + sum(map(len, self._sorted))

    def add(self, digest: bytes) -> bool:
        """Whether it was not there before."""
        key = digest[:SIZE]
        if key in self._new or any(_holds(some, key) for some in self._sorted):
            return False
        self._new.add(key)
        if len(self._new) == self._most:
            self._settle()
        return True

    def _settle(self) -> None:
        some = np.frombuffer(b"".join(self._new), f"S{SIZE}")
        self._new.clear()
        while self._sorted and len(self._sorted[-1]) <= 2 * len(some):
            some = np.concatenate([some, self._sorted.pop()])
        self._sorted.append(np.sort(some))


def _holds(some: NDArray[Any], key: bytes) -> bool:
    place = int(np.searchsorted(some, np.bytes_(key)))
    return place < len(some) and some[place : place + 1].tobytes() == key
