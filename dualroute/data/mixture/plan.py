"""The samples of several sources as one plan, with one integer of state like that of a single source.

In: a plan for each source (`dualroute.data.plan.BatchPlan`, packed rows, or the packed examples of a task)
and a `Schedule`. Out: a `SamplePlan`. A sample's id holds the number of its source in its upper bits
(`split_ids`), so ids of source 0 are those that it has alone.

Within a source the samples come in the order that the source has alone: its turn number k is sample k of its
own plan, so each of its windows comes once per epoch of the source, whatever the others do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from dualroute.data.mixture.schedule import Int64, Schedule
from dualroute.data.plan import EMPTY, SamplePlan, SequencePlan, Span, WalkSequence

_SOURCE_SHIFT = 48


def join_ids(source: int, ids: Int64) -> Int64:
    """Ids of the mixture from those of a source; `EMPTY` stays."""
    return np.where(ids == EMPTY, EMPTY, ids + (source << _SOURCE_SHIFT))


def split_ids(ids: ArrayLike) -> tuple[Int64, Int64]:
    """(numbers of the sources, ids in them); of `EMPTY` the number is -1."""
    ids = np.asarray(ids, dtype=np.int64)
    sources = ids >> _SOURCE_SHIFT  # -1 for EMPTY
    return sources, np.where(sources < 0, EMPTY, ids & ((1 << _SOURCE_SHIFT) - 1))


def _targets_of(parts: Sequence[SamplePlan] | Sequence[SequencePlan], samples: ArrayLike) -> int:
    sources, ids = split_ids(samples)
    numbers = [source for source in np.unique(sources).tolist() if source >= 0]
    return sum(parts[source].num_targets(ids[sources == source]) for source in numbers)


@dataclass(frozen=True, eq=False)
class MixturePlan:
    """The order of a training on several sources; see `dualroute.data.plan.SamplePlan`.

    Attributes:
        parts: the plan of each source.
        schedule: whose turn a sample is; keys as many as parts.
    """

    parts: Sequence[SamplePlan]
    schedule: Schedule

    @property
    def samples_per_batch(self) -> int:
        return self.parts[0].samples_per_batch

    @property
    def context(self) -> int:
        return self.parts[0].context

    @cached_property
    def windows_per_epoch(self) -> int:
        """Of all sources together: after so many samples, as much has been read as there is."""
        return sum(part.windows_per_epoch for part in self.parts)

    def epochs(self, samples: int) -> float:
        """How often as much has been read as there is in all sources; for each, see `epochs_by_source`."""
        return samples / self.windows_per_epoch

    def samples_in(self, epochs: float) -> int:
        """See `SamplePlan.samples_in`."""
        return math.ceil(round(epochs * self.windows_per_epoch, 6))

    def samples_by_source(self, samples: int, skipped: Sequence[Span] = ()) -> Int64:
        """(sources,) how many of the first ``samples`` samples are of each, without those of ``skipped``."""
        counts = self.schedule.counts(samples)
        for start, stop in skipped:
            start, stop = min(start, samples), min(stop, samples)
            counts = counts - (self.schedule.counts(stop) - self.schedule.counts(start))
        return counts

    def epochs_by_source(self, samples: int) -> list[float]:
        """Passes over each source that the first ``samples`` samples of the run make."""
        counts = self.schedule.counts(samples).tolist()
        return [part.epochs(count) for part, count in zip(self.parts, counts, strict=True)]

    def figures(self, names: Sequence[str], samples: int, skipped: Sequence[Span] = ()) -> dict[str, float]:
        """{tag: tokens or epochs} of each source after so many samples of the run."""
        found: dict[str, float] = {}
        counts, passes = self.samples_by_source(samples, skipped).tolist(), self.epochs_by_source(samples)
        for name, count, epochs in zip(names, counts, passes, strict=True):
            found[f"data/tokens_by_source/{name}"] = count * self.context
            found[f"data/epochs_by_source/{name}"] = epochs
        return found

    def ids(self, numbers: Int64) -> Int64:
        """See `SamplePlan.ids`."""
        sources, indices = self.schedule.turns(numbers)
        ids = np.empty_like(indices)
        for source in np.unique(sources).tolist():
            mask = sources == source
            ids[mask] = join_ids(source, self.parts[source].ids(indices[mask]))
        return ids

    def sample_ids(self, first: int, count: int) -> Int64:
        """Ids (count,) of the samples numbered first, first + 1, ... of the run."""
        return self.ids(np.arange(first, first + count, dtype=np.int64))

    def num_targets(self, samples: ArrayLike) -> int:
        """See `SamplePlan.num_targets`."""
        return _targets_of(self.parts, samples)


@dataclass(frozen=True, eq=False)
class MixtureSequence:
    """Every validation window of every source, source by source; see `dualroute.data.plan.SequencePlan`.

    Attributes:
        parts: those of each source.
    """

    parts: Sequence[SequencePlan]

    @property
    def windows(self) -> int:
        return sum(part.windows for part in self.parts)

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    def num_targets(self, samples: ArrayLike) -> int:
        """See `SequencePlan.num_targets`."""
        return _targets_of(self.parts, samples)


class WalkSources(WalkSequence):
    """`WalkSequence` over a `MixtureSequence` in batches that are each of one source, over all ranks."""

    plan: MixtureSequence

    def __len__(self) -> int:
        together = self.world_size * self.batch_size
        return sum(-(-part.windows // together) for part in self.plan.parts)

    def batches(self) -> Iterator[Int64]:
        together = self.world_size * self.batch_size
        for source, part in enumerate(self.plan.parts):
            for first in range(0, part.windows, together):
                batch = np.arange(first, first + together)
                batch[batch >= part.windows] = EMPTY
                yield join_ids(source, batch)
