"""Whose turn is it?  Sample number → (source, number within the source), in constant time.

In: the weights of the stages of a mixture. Out: turns, of which `dualroute.data.mixture.plan` makes samples.

1. Weights become whole numbers of turns (`turns_of`) in a period of at most `LONGEST_PERIOD`: 0.7 and 0.3 are
   7 and 3 of 10. What has no such period is rounded to 1 / `LONGEST_PERIOD`, by largest remainders.
2. Turn j of m of a source must lie in [floor((j - 1) P / m), ceil(j P / m)) of the period P. Taking, in each
   place, the one of those that may whose end comes first keeps all of them (Baruah, Cohen, Plaxton & Varvel
   1996, "Proportionate progress": earliest deadlines first, on one processor). So after n turns a source has
   had more than w n - 1 and fewer than w n + 1 of them, for every n. Held are the turns of a period.
3. A stage begins a period of its own (`Schedule`); the numbers within a source go on from where they were.

Ties go by the sources' keys (their fingerprints): neither their order in the configuration nor one that has
no turns yet makes any difference.
"""

from __future__ import annotations

import bisect
import functools
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int64 = NDArray[np.int64]
LONGEST_PERIOD = 100_000


def turns_of(weights: Mapping[str, float], temperature: float = 1.0) -> dict[str, int]:
    """Turns of each source in a period, without a common divisor; those without weight have none.

    Args:
        weights: {key: 0 or more}, in any unit.
        temperature: weights are taken to the power of 1 / temperature: above 1 makes them more alike
            (Arivazhagan et al. 2019, https://arxiv.org/abs/1907.05019).
    """
    # as they were written: 0.7 is 7/10
    exact = {key: Fraction(str(weight)) for key, weight in weights.items() if weight > 0}
    if temperature != 1:
        largest = max(exact.values())
        exact = {
            key: Fraction(float(weight / largest) ** (1 / temperature)).limit_denominator(10**12)
            for key, weight in exact.items()
        }
    total = sum(exact.values())
    shares = {key: weight / total for key, weight in exact.items()}
    period = math.lcm(*(share.denominator for share in shares.values()))
    if period > LONGEST_PERIOD:
        return _rounded(shares)
    return {key: int(share * period) for key, share in shares.items()}


def _rounded(shares: Mapping[str, Fraction]) -> dict[str, int]:
    """Largest remainders, at least one turn each."""
    turns = {key: max(int(share * LONGEST_PERIOD), 1) for key, share in shares.items()}
    missing = LONGEST_PERIOD - sum(turns.values())
    by_need = sorted(turns, key=lambda key: (turns[key] - shares[key] * LONGEST_PERIOD, key))
    if missing >= 0:
        for key in by_need[:missing]:
            turns[key] += 1
    else:  # many that are rounded up to one turn: the largest give
        for _ in range(-missing):
            turns[max(turns, key=lambda key: (turns[key] - shares[key] * LONGEST_PERIOD, turns[key]))] -= 1
    divisor = math.gcd(*turns.values())
    return {key: count // divisor for key, count in turns.items()}


@functools.lru_cache(maxsize=64)
def period_of(turns: tuple[int, ...]) -> NDArray[np.int16]:
    """(sum of turns,) whose turn each place of a period is; ``turns`` in the order in which ties go."""
    period = sum(turns)
    releases, deadlines, owners = [], [], []
    for owner, count in enumerate(turns):
        if count:
            jobs = np.arange(count, dtype=np.int64)
            releases.append(jobs * period // count)
            deadlines.append(-(-(jobs + 1) * period // count))
            owners.append(np.full(count, owner))
    release, deadline, of = (np.concatenate(one) for one in (releases, deadlines, owners))
    order = np.argsort(release, kind="stable")
    waiting = list(zip(release[order].tolist(), deadline[order].tolist(), of[order].tolist(), strict=True))
    places = np.empty(period, dtype=np.int16)
    ready: list[tuple[int, int]] = []
    at = 0
    for place in range(period):
        while at < period and waiting[at][0] <= place:
            heapq.heappush(ready, waiting[at][1:])
            at += 1
        places[place] = heapq.heappop(ready)[1]
    return places


class Turns(NamedTuple):
    """Of some sample numbers: whose they are, and which of its samples."""

    sources: Int64
    indices: Int64


class _Period:
    """One period: whose places, how many before, and where the k-th of each source is."""

    def __init__(self, turns: Sequence[int]) -> None:
        self.turns = np.array(turns, dtype=np.int64)
        self.length = int(self.turns.sum())
        self.places = period_of(tuple(turns)).astype(np.int64)
        #: (length,) turns that the owner of a place has had before it
        self.before = np.empty(self.length, dtype=np.int64)
        for owner in np.flatnonzero(self.turns):
            mine = np.flatnonzero(self.places == owner)
            self.before[mine] = np.arange(len(mine))

    def counts(self, places: int) -> Int64:
        """(sources,) turns of each in the first ``places`` places."""
        whole, rest = divmod(places, self.length)
        return whole * self.turns + np.bincount(self.places[:rest], minlength=len(self.turns))


@dataclass(frozen=True, eq=False)
class Schedule:
    """Whose turn each sample of a run is.

    Attributes:
        keys: of the sources, in the order of their numbers; ties go by the order of the keys.
        stages: (first sample, {key: turns in a period}), the first from sample 0 on.
    """

    keys: tuple[str, ...]
    stages: tuple[tuple[int, Mapping[str, int]], ...]

    @functools.cached_property
    def _numbers(self) -> Int64:
        """(sources,) the number of the source that stands at each place in the order of ties."""
        return np.array(sorted(range(len(self.keys)), key=lambda number: self.keys[number]), dtype=np.int64)

    @functools.cached_property
    def _periods(self) -> list[_Period]:
        return [
            _Period([int(turns.get(self.keys[number], 0)) for number in self._numbers.tolist()])
            for _, turns in self.stages
        ]

    @functools.cached_property
    def _firsts(self) -> list[int]:
        return [first for first, _ in self.stages]

    @functools.cached_property
    def _counts(self) -> list[Int64]:
        """(sources,) turns before each stage, in the order of ties."""
        counts = [np.zeros(len(self.keys), dtype=np.int64)]
        for number, (first, then) in enumerate(pairwise(self._firsts)):
            counts.append(counts[-1] + self._periods[number].counts(then - first))
        return counts

    def stage_of(self, sample: int) -> int:
        """Number of the stage that a sample is in."""
        return bisect.bisect_right(self._firsts, sample) - 1

    def counts(self, samples: int) -> Int64:
        """(sources,) how many of the first ``samples`` samples are of each source."""
        stage = self.stage_of(samples)
        in_order = self._counts[stage] + self._periods[stage].counts(samples - self._firsts[stage])
        found = np.empty_like(in_order)
        found[self._numbers] = in_order
        return found

    def turns(self, samples: ArrayLike) -> Turns:
        """Source and number within it of each sample (n,)."""
        samples = np.asarray(samples, dtype=np.int64)
        sources, indices = np.empty_like(samples), np.empty_like(samples)
        stages = np.searchsorted(self._firsts, samples, side="right") - 1
        for stage in np.unique(stages).tolist():
            period, mask = self._periods[stage], stages == stage
            whole, place = np.divmod(samples[mask] - self._firsts[stage], period.length)
            owner = period.places[place]
            indices[mask] = self._counts[stage][owner] + whole * period.turns[owner] + period.before[place]
            sources[mask] = self._numbers[owner]
        return Turns(sources, indices)
