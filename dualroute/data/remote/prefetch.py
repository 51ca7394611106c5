"""Brings the shards that the plan will need next, while the present ones are read.

In: a batch sampler, whose batches are known before they are asked for, and the `Mirror`. Here: the sampler
    is read a
little ahead, and threads of the training process bring the shards of what lies ahead. Out: the same batches,
one by one, in the same order. What cannot be brought is left to the reader, which says so where it matters.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dualroute.data.manifest import Manifest
from dualroute.data.manifest_parts import Shard
from dualroute.data.mixture.plan import split_ids
from dualroute.data.plan import Request
from dualroute.data.remote.mirror import Mirror

_MOST_THREADS = 4
_MOST_BATCHES = 256
_BATCHES_AT_ONCE = 4  # read ahead for each one that is handed on, so that the first comes at once
_log = logging.getLogger(__name__)

#: A shard, and what brings it.
Place = tuple[Mirror, Shard]


class Wanted:
    """Which shards the samples of a split need.

    Args:
        manifests: of the sources.
        split: train or val.
        plans: of the sources, which know the documents of a sample.
    """

    def __init__(self, manifests: Sequence[Manifest], split: str, plans: Sequence[Any]) -> None:
        self._plans = plans
        self._mirrors = [manifest.mirror for manifest in manifests]
        splits = [manifest.splits.get(split) for manifest in manifests]
        self._shards = [() if one is None else one.shards for one in splits]
        self._ends = [
            np.cumsum([shard.documents for shard in shards], dtype=np.int64) for shards in self._shards
        ]

    def of(self, batch: Iterable[Request]) -> list[Place]:
        """The shards elsewhere that a batch is read from, in order."""
        found: dict[Place, None] = {}
        for request in batch:
            source, sample = (0, request.sample) if len(self._plans) == 1 else self._own(request.sample)
            mirror = None if source < 0 else self._mirrors[source]
            if mirror is None:
                continue
            documents = self._plans[source].pieces(sample)[:, 0]
            numbers = np.unique(np.searchsorted(self._ends[source], documents, side="right")).tolist()
            found |= dict.fromkeys((mirror, self._shards[source][number]) for number in numbers)
        return list(found)

    @staticmethod
    def _own(sample: int) -> tuple[int, int]:
        source, own = split_ids(sample)
        return int(source), int(own)


class ReadAhead:
    """A batch sampler that brings the shards of the batches to come.

    Args:
        sampler: of the batches.
        needs: batch → what it is read from.
        shards_ahead: shards not read yet that are brought at most.
    """

    def __init__(self, sampler: Any, needs: Callable[[Any], list[Place]], shards_ahead: int) -> None:
        self.sampler, self.needs, self.shards_ahead = sampler, needs, shards_ahead
        self.batch_size = sampler.batch_size

    def __iter__(self) -> Iterator[Any]:
        threads = _Threads(min(self.shards_ahead, _MOST_THREADS))
        batches, ahead = iter(self.sampler), deque[tuple[Any, list[Place]]]()
        needed: dict[Place, int] = {}  # batches ahead that need it
        try:
            while True:
                for _ in range(_BATCHES_AT_ONCE):
                    if ahead and (self._enough(needed) or len(ahead) >= _MOST_BATCHES):
                        break
                    batch = next(batches, None)
                    if batch is None:
                        break
                    places = self.needs(batch)
                    ahead.append((batch, places))
                    for place in places:
                        needed[place] = needed.get(place, 0) + 1
                        if needed[place] == 1:
                            threads.bring(place)
                if not ahead:
                    return
                batch, places = ahead.popleft()
                for place in places:
                    needed[place] -= 1
                    if not needed[place]:
                        del needed[place]
                yield batch
        finally:
            threads.stop()

    def _enough(self, needed: dict[Place, int]) -> bool:
        """Whether no further shard is to be brought now: more than a quarter of the cache would drive out
        what was brought before it is read."""
        if not needed:
            return False
        size = sum(shard.size for _, shard in needed)
        return len(needed) >= self.shards_ahead or size >= next(iter(needed))[0].limit // 4


class SizedReadAhead(ReadAhead):
    """`ReadAhead` over a sampler that ends."""

    def __len__(self) -> int:
        return len(self.sampler)


def read_ahead(sampler: Any, needs: Callable[[Any], list[Place]], shards_ahead: int) -> ReadAhead:
    """A sampler that reads ahead; it has a length where ``sampler`` has one."""
    kind = SizedReadAhead if hasattr(type(sampler), "__len__") else ReadAhead
    return kind(sampler, needs, shards_ahead)


class _Threads:
    """Threads that bring shards, first asked first; they end with the process."""

    def __init__(self, count: int) -> None:
        self._wanted: queue.SimpleQueue[Place | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._count = count
        self._threads: list[threading.Thread] = []

    def bring(self, place: Place) -> None:
        mirror, shard = place
        if mirror.holds(shard.file, shard.size):
            return
        self._wanted.put(place)
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
        while (place := self._wanted.get()) is not None and not self._stopped.is_set():
            mirror, shard = place
            try:
                mirror.get(shard.file, shard.sha256, shard.size)
            except Exception as error:
                _log.debug("%s: not brought ahead (%s)", shard.file, error)
