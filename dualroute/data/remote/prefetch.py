"""Brings the shards that the plan will need next, while the present ones are read.

In: a batch sampler, whose batches are known before they are asked for, and the `Mirror`. Here: the sampler is read a
little ahead, and threads of the training process bring the shards of what lies ahead. Out: the same batches, one
by one, in the same order. What cannot be brought is left to the reader, which says so where it matters.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualroute.data.manifest_parts import Shard
from dualroute.data.remote.mirror import Mirror

_MOST_THREADS = 4
_MOST_BATCHES = 256
_BATCHES_AT_ONCE = 4  # read ahead for each one that is handed on, so that the first comes at once
_log = logging.getLogger(__name__)

#: Batch → stream positions (n, 2) that it reads from and up to.
Spans = Callable[[Any], Iterable[tuple[int, int]]]


class ShardPlaces:
    """Which shards hold which tokens of a split's stream."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._ends: NDArray[np.int64] = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)

    def of(self, spans: Iterable[tuple[int, int]]) -> list[int]:
        """Numbers of the shards, in the order in which they are read."""
        numbers: dict[int, None] = {}
        for start, stop in spans:
            # a window may end with a label that is one token further
            first, last = np.searchsorted(self._ends, [start, stop], side="right").tolist()
            numbers |= dict.fromkeys(range(first, min(last, len(self._ends) - 1) + 1))
        return list(numbers)


class ReadAhead:
    """A batch sampler that brings the shards of the batches to come.

    Args:
        sampler: of the batches.
        spans: of a batch.
        mirror, shards: what is brought.
        shards_ahead: shards not read yet that are brought at most.
    """

    def __init__(
        self, sampler: Any, spans: Spans, mirror: Mirror, shards: Sequence[Shard], shards_ahead: int
    ) -> None:
        self.sampler, self.spans, self.mirror, self.shards = sampler, spans, mirror, shards
        self.batch_size = sampler.batch_size
        largest = max(shard.size for shard in shards)
        # no more than a quarter of the cache, or what is brought would drive out what was brought before
        self.shards_ahead = max(1, min(shards_ahead, mirror.limit // (4 * largest)))
        self._places = ShardPlaces(shards)

    def __iter__(self) -> Iterator[Any]:
        threads = _Threads(self.mirror, self.shards, min(self.shards_ahead, _MOST_THREADS))
        batches, ahead = iter(self.sampler), deque[tuple[Any, list[int]]]()
        needed: dict[int, int] = {}  # shard → batches ahead that need it
        try:
            while True:
                for _ in range(_BATCHES_AT_ONCE):
                    if ahead and (len(needed) >= self.shards_ahead or len(ahead) >= _MOST_BATCHES):
                        break
                    batch = next(batches, None)
                    if batch is None:
                        break
                    numbers = self._places.of(self.spans(batch))
                    ahead.append((batch, numbers))
                    for number in numbers:
                        needed[number] = needed.get(number, 0) + 1
                        if needed[number] == 1:
                            threads.bring(number)
                if not ahead:
                    return
                batch, numbers = ahead.popleft()
                for number in numbers:
                    needed[number] -= 1
                    if not needed[number]:
                        del needed[number]
                yield batch
        finally:
            threads.stop()


class SizedReadAhead(ReadAhead):
    """`ReadAhead` over a sampler that ends."""

    def __len__(self) -> int:
        return len(self.sampler)


def read_ahead(sampler: Any, spans: Spans, mirror: Mirror, shards: Sequence[Shard], shards_ahead: int) -> Any:
    """A sampler that reads ahead; it has a length where ``sampler`` has one."""
    kind = SizedReadAhead if hasattr(type(sampler), "__len__") else ReadAhead
    return kind(sampler, spans, mirror, shards, shards_ahead)


class _Threads:
    """Threads that bring shards, first asked first; they end with the process."""

    def __init__(self, mirror: Mirror, shards: Sequence[Shard], count: int) -> None:
        self._mirror, self._shards = mirror, shards
        self._wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._count = count
        self._threads: list[threading.Thread] = []

    def bring(self, number: int) -> None:
        if self._mirror.holds(self._shards[number].file, self._shards[number].size):
            return
        self._wanted.put(number)
        if len(self._threads) < self._count:
            thread = threading.Thread(target=self._work, name="shards ahead", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Bring nothing more; what is under way is finished."""
        self._stopped.set()
        for _ in self._threads:
            self._wanted.put(None)

    def _work(self) -> None:
        while (number := self._wanted.get()) is not None and not self._stopped.is_set():
            shard = self._shards[number]
            try:
                self._mirror.get(shard.file, shard.sha256, shard.size)
            except Exception as error:
                _log.debug("%s: not brought ahead (%s)", shard.file, error)
