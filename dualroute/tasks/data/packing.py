"""Which examples share a window: pure functions of (lengths, fingerprint, seed, epoch, context).

In: how many tokens and targets each example has.  Here: an epoch visits the examples in a seeded order and
puts each, whole, into the first of a few open windows that has room (:func:`pack`); the windows of one epoch
follow those of the epoch before.  Next: the loaders ask for windows by number
(:class:`dualroute.data.plan.WalkPlan`), and :mod:`~dualroute.tasks.data.module` lays the examples out.

Epochs differ a little in their number of windows, because each packs another order.  A window's number is
counted through all of them, so that a position in a run is one number, as in pretraining.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from dualroute.data.order.permutation import ROUNDS, permute, seeded_words
from dualroute.data.plan import EMPTY, Int64

#: Windows that are open at a time: more pack tighter and take longer.
OPEN_WINDOWS = 16


class Packed(NamedTuple):
    """Windows and what is in them.

    Attributes:
        members: (examples,) their numbers, window after window.
        bounds: (windows + 1,) where each window begins in ``members``.
    """

    members: Int64
    bounds: Int64

    @property
    def windows(self) -> int:
        return len(self.bounds) - 1

    def window(self, number: int) -> Int64:
        """Numbers of the examples in a window, in their order."""
        return self.members[self.bounds[number] : self.bounds[number + 1]]

    def sums(self, values: Int64) -> Int64:
        """(windows,) of one value an example."""
        before = np.concatenate([[0], np.cumsum(values[self.members])])
        return np.asarray(before[self.bounds[1:]] - before[self.bounds[:-1]], dtype=np.int64)


def pack(lengths: Int64, order: Int64, context: int) -> Packed:
    """Put examples, in ``order``, into windows of ``context`` slots: each into the first open one with room.

    With `OPEN_WINDOWS` open the fullest is closed for a new one.

    Raises:
        ValueError: An example is longer than a window, or has no tokens.
    """
    if len(lengths) and (int(lengths.max()) > context or int(lengths.min()) < 1):
        raise ValueError(f"examples of {lengths.min()} to {lengths.max()} tokens do not fit into {context}")
    rooms: list[int] = []
    inside: list[list[int]] = []
    closed: list[list[int]] = []
    for example, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = next((k for k, room in enumerate(rooms) if room >= length), None)
        if place is None:
            if len(rooms) == OPEN_WINDOWS:
                fullest = rooms.index(min(rooms))
                del rooms[fullest]
                closed.append(inside.pop(fullest))
            rooms.append(context)
            inside.append([])
            place = len(rooms) - 1
        rooms[place] -= length
        inside[place].append(example)
        if not rooms[place]:
            del rooms[place]
            closed.append(inside.pop(place))
    windows = closed + inside
    members = np.array([example for window in windows for example in window], dtype=np.int64)
    bounds = np.cumsum([0, *(len(window) for window in windows)], dtype=np.int64)
    return Packed(members, bounds)


class PackedPlan:
    """The order of a training on packed examples; see `dualroute.data.plan.SamplePlan`.

    Args:
        lengths: (examples,) tokens of each.
        targets: (examples,) targets of each.
        fingerprint: of the data, so that other data mean another order.
        seed: any integer.
        context: slots of a window.
        samples_per_batch: windows per optimizer step, over all ranks.
        first: number of the first of the examples among those of all sources.
    """

    def __init__(
        self,
        lengths: Int64,
        targets: Int64,
        fingerprint: str,
        seed: int,
        context: int,
        samples_per_batch: int,
        first: int = 0,
    ) -> None:
        if not len(lengths):
            raise ValueError("there are no examples")
        self.lengths, self.targets = lengths, targets
        self.fingerprint, self.seed = fingerprint, seed
        self.context, self.samples_per_batch, self.first = context, samples_per_batch, first
        self._firsts = [0]  # windows before each epoch, as far as they are known
        self._cached: tuple[int, Packed] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cached": None}

    def epoch(self, number: int) -> Packed:
        """The windows of an epoch."""
        if self._cached is None or self._cached[0] != number:
            keys = seeded_words(self.fingerprint, self.seed, number, "examples", count=ROUNDS)
            order = permute(np.arange(len(self.lengths)), len(self.lengths), keys)
            self._cached = number, pack(self.lengths, order, self.context)
        return self._cached[1]

    def _first(self, epoch: int) -> int:
        """Windows before an epoch."""
        while len(self._firsts) <= epoch:
            self._firsts.append(self._firsts[-1] + self.epoch(len(self._firsts) - 1).windows)
        return self._firsts[epoch]

    def place(self, sample: int) -> tuple[int, int]:
        """(epoch, window in it) of a sample."""
        epoch = max(int(np.searchsorted(self._firsts, sample, side="right")) - 1, 0)
        while self._first(epoch + 1) <= sample:
            epoch += 1
        return epoch, sample - self._first(epoch)

    def examples(self, sample: int) -> Int64:
        """Numbers of the examples in a window; none for `EMPTY`."""
        if sample == EMPTY:
            return np.zeros(0, dtype=np.int64)
        return self._own(sample) + self.first

    def _own(self, sample: int) -> Int64:
        epoch, window = self.place(sample)
        return self.epoch(epoch).window(window)

    @property
    def windows_per_epoch(self) -> int:
        """Of the first epoch; the others have about as many."""
        return self._first(1)

    def epochs(self, samples: int) -> float:
        """See `SamplePlan.epochs`."""
        epoch, window = self.place(samples)
        return epoch + window / (self._first(epoch + 1) - self._first(epoch))

    def samples_in(self, epochs: float) -> int:
        """See `SamplePlan.samples_in`."""
        whole = int(epochs)
        samples = self._first(whole)
        if epochs > whole:
            samples += math.ceil(round((epochs - whole) * (self._first(whole + 1) - samples), 6))
        return max(samples, 1)

    def ids(self, numbers: Int64) -> Int64:
        """See `SamplePlan.ids`: a window's number in the run."""
        return numbers

    def num_targets(self, samples: ArrayLike) -> int:
        """See `SamplePlan.num_targets`."""
        numbers = np.asarray(samples).tolist()
        return sum(int(self.targets[self._own(s)].sum()) for s in numbers if s != EMPTY)


class PackedSequence:
    """Every example once, packed in its own order: how validation and prediction read; see
    `dualroute.data.plan.SequencePlan`.

    Args:
        lengths, targets, context: as for `PackedPlan`.
        limit: at most so many slots together (a row at least), of rows evenly spread over all: the first
            ones of a file that is sorted by class would be of one class.  None for all.
        rows: (examples,) the row of each example, ascending; a row is read whole or not at all.  By default
            each example is one.
    """

    def __init__(
        self,
        lengths: Int64,
        targets: Int64,
        context: int,
        limit: int | None = None,
        rows: ArrayLike | None = None,
    ) -> None:
        self.lengths, self.targets, self.context = lengths, targets, context
        self.packed = pack(lengths, np.arange(len(lengths)), context)
        if limit is not None:
            self._spread(
                max(limit // context, 1), np.arange(len(lengths)) if rows is None else np.asarray(rows)
            )

    def _spread(self, most: int, rows: Int64) -> None:
        """Keep evenly spread rows, as many as fit into ``most`` windows."""
        _, ordinal = np.unique(rows, return_inverse=True)
        count = total = int(ordinal.max(initial=-1)) + 1
        while self.windows > most and count > 1:
            count = min(count - 1, count * most // self.windows + 1)
            read = np.zeros(total, dtype=bool)
            read[np.arange(count) * total // count] = True
            self.packed = pack(self.lengths, np.flatnonzero(read[ordinal]), self.context)

    @property
    def windows(self) -> int:
        return self.packed.windows

    @property
    def tokens(self) -> int:
        """Of the examples that are read."""
        return int(self.lengths[self.packed.members].sum())

    def examples(self, sample: int) -> Int64:
        """Numbers of the examples in a window; none for `EMPTY`."""
        return np.zeros(0, dtype=np.int64) if sample == EMPTY else self.packed.window(sample)

    def num_targets(self, samples: ArrayLike) -> int:
        """See `SequencePlan.num_targets`."""
        return sum(int(self.targets[self.examples(s)].sum()) for s in np.asarray(samples).tolist())
