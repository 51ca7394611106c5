"""Which tokens make the next batch: pure functions of (fingerprint, seed, context, samples consumed).

In: the lengths of the documents (from the manifest's index) and the manifest's fingerprint. Out: requests for
samples, micro batch by micro batch for one rank, and the spans of the token stream that a sample stands for.
`reader` turns them into tensors. The order of this file is the order of the list.

1. The documents of a split, in manifest order, are one stream of T tokens (`DocumentStream`). Training
   closes it to a ring: the first document follows the last one, as a document boundary like any other.
2. Epoch e cuts the ring into W = T // context windows, the first of them at a seeded offset in [0, context).
   Whatever the offset, an epoch has W windows, reads no token twice, and leaves out the T mod context
   tokens (less than one window) that lie just before the offset. Sample id = e * W + window.
3. Within an epoch, the windows are visited in the order of a keyed permutation of [0, W) (`permutation`).
4. Sample number s of the run, counted over all ranks from its first step, is in epoch s // W. A global batch
   is the next ``samples_per_batch`` of them; at the end of an epoch it goes on into the next one
   (`BatchPlan`; validation reads each window once, in order: `SequentialPlan`).
5. Each rank takes its part of every global batch (`micro_batches`), without end (`WalkPlan`) or to the end of
   the split (`WalkSequence`).

Nothing is shuffled. The permutation is a small cipher computed at the indices asked for, so order costs O(1)
memory whatever the corpus, and resuming at sample 10^12 is as quick as starting. What is held is a quarter of
a bit per document (`DocumentStream`); the lengths stay in the index, which the processes of a node share.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from dualroute.data.order.document_stream import DocumentStream, Int64, Span
from dualroute.data.order.permutation import Shuffle, seeded_words, visited
from dualroute.errors import UserError

#: Stands for "no window" (a row of padding) where a sample id is expected.
EMPTY = -1
#: The numbers of a batch's samples are held in memory: 128 MiB of them.
MAX_SAMPLES_PER_BATCH = 1 << 24


class WindowPlan(Protocol):
    """What the reader needs of a plan: training's `BatchPlan`, validation's `SequentialPlan`, or rows that
    documents are packed into (`dualroute.data.order.packing`)."""

    @property
    def context(self) -> int: ...

    def pieces(self, sample: int) -> Int64:
        """What one sample is made of, in reading order, as `DocumentStream.pieces` has it; what that lacks of
        ``context`` tokens is padding."""
        ...

    def num_targets(self, samples: ArrayLike) -> int:
        """Labels other than -100 in these samples together."""
        ...


class SamplePlan(Protocol):
    """What the loaders need of the order of a training: `BatchPlan`, or that of packed examples."""

    @property
    def samples_per_batch(self) -> int: ...

    @property
    def context(self) -> int: ...

    @property
    def windows_per_epoch(self) -> int: ...

    def epochs(self, samples: int) -> float:
        """Passes over the training data that the first ``samples`` samples of the run make."""
        ...

    def samples_in(self, epochs: float) -> int:
        """The samples of so many passes, rounded up."""
        ...

    def ids(self, numbers: Int64) -> Int64:
        """Ids of the samples that have these numbers in the run."""
        ...

    def num_targets(self, samples: ArrayLike) -> int:
        """Labels other than -100 in these samples together."""
        ...


class SequencePlan(Protocol):
    """What the loaders need of the windows of a validation."""

    @property
    def windows(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    def num_targets(self, samples: ArrayLike) -> int:
        """Labels other than -100 in these samples together; `EMPTY` has none."""
        ...


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The order of a training run. Everything is a pure function of the fields and the arguments.

    Attributes:
        stream: the training documents.
        fingerprint: of the manifest, so that other data mean another order.
        seed: any integer.
        context: tokens per sample.
        samples_per_batch: samples per optimizer step, over all ranks.
        shuffle: among how much of the data the order is random; null is all.

    Raises:
        UserError: fewer tokens than one window, or a number below 1.
    """

    stream: DocumentStream
    fingerprint: str
    seed: int
    context: int
    samples_per_batch: int
    shuffle: Shuffle | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("context", "samples_per_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.stream.tokens < self.context:
            raise UserError(
                f"context={self.context} is longer than the training data of {self.stream.tokens} tokens: "
                "no window fits; lower context or prepare more data"
            )

    @property
    def windows_per_epoch(self) -> int:
        return self.stream.tokens // self.context

    def epochs(self, samples: int) -> float:
        """Passes over the training data that the first ``samples`` samples of the run make: 2.0 once every
        window has been read twice. `int(epochs(samples_consumed))` is the number of the present pass, from 0.
        """
        return samples / self.windows_per_epoch

    def samples_in(self, epochs: float) -> int:
        """See `SamplePlan.samples_in`."""
        return math.ceil(round(epochs * self.windows_per_epoch, 6))

    def sample_ids(self, first: int, count: int) -> Int64:
        """Ids (count,) of the samples numbered first, first + 1, ... of the run."""
        return self.ids(np.arange(first, first + count, dtype=np.int64))

    def ids(self, numbers: Int64) -> Int64:
        """Ids of the samples that have these numbers in the run."""
        key = (self.fingerprint, self.seed, "order")
        return visited(numbers, self.windows_per_epoch, *key, shuffle=self.shuffle)

    def batch(self, samples_consumed: int) -> Int64:
        """Sample ids (samples_per_batch,) of the global batch that follows ``samples_consumed``.

        Global batch number g of a run whose batch never changed is ``batch(g * samples_per_batch)``.
        """
        return self.sample_ids(samples_consumed, self.samples_per_batch)

    def starts(self, samples: ArrayLike) -> Int64:
        """Ring positions of the first tokens of ``samples``."""
        epochs, windows = np.divmod(np.asarray(samples, dtype=np.int64), self.windows_per_epoch)
        starts = windows * self.context
        for epoch in np.unique(epochs):
            starts[epochs == epoch] += _offset_word(self.fingerprint, self.seed, int(epoch)) % self.context
        return starts % self.stream.tokens

    def pieces(self, sample: int) -> Int64:
        """See `WindowPlan.pieces`."""
        return np.concatenate([self.stream.pieces(*span) for span in self.spans(sample)])

    def spans(self, sample: int) -> list[Span]:
        """Stream ranges of one sample: one, or two where the window crosses the seam of the ring."""
        epoch, window = divmod(int(sample), self.windows_per_epoch)
        offset = _offset_word(self.fingerprint, self.seed, epoch) % self.context
        start = (window * self.context + offset) % self.stream.tokens
        beyond = start + self.context - self.stream.tokens
        return [(start, start + self.context)] if beyond <= 0 else [(start, self.stream.tokens), (0, beyond)]

    def num_targets(self, samples: ArrayLike) -> int:
        """See `WindowPlan.num_targets`. Two binary searches per sample; reads no shard."""
        starts, tokens = self.starts(samples), self.stream.tokens
        stops = starts + self.context
        targets = self.stream.targets_before(np.minimum(stops, tokens)) - self.stream.targets_before(starts)
        return int(np.sum(targets + self.stream.targets_before(np.maximum(stops - tokens, 0))))


@functools.lru_cache(1024)
def _offset_word(fingerprint: str, seed: int, epoch: int) -> int:
    """What the offset of an epoch is the remainder of."""
    return int(seeded_words(fingerprint, seed, epoch, "offset", count=1)[0])


@dataclass(frozen=True, eq=False)
class SequentialPlan:
    """Every window of a split once, in order, the last one padded: how validation reads.

    Attributes:
        stream: the documents.
        context: tokens per sample.
        limit: read the first ``limit`` tokens only (None: all), whatever the context; the same targets are
            scored for every context, and each of them exactly once.

    Raises:
        UserError: context or limit below 1.
    """

    stream: DocumentStream
    context: int
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.context < 1:
            raise UserError(f"context must be at least 1, not {self.context}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"val_tokens must be at least 1, or null for all of them, not {self.limit}")

    @property
    def tokens(self) -> int:
        return self.stream.tokens if self.limit is None else min(self.limit, self.stream.tokens)

    @property
    def windows(self) -> int:
        return -(-self.tokens // self.context)

    def pieces(self, sample: int) -> Int64:
        """See `WindowPlan.pieces`; none for `EMPTY`."""
        parts = [self.stream.pieces(*span) for span in self.spans(sample)]
        return np.concatenate([np.zeros((0, 4), dtype=np.int64), *parts])

    def spans(self, sample: int) -> list[Span]:
        """Stream range of one sample, what it lacks of ``context`` tokens is padding; none for `EMPTY`."""
        if sample == EMPTY:
            return []
        return [(sample * self.context, min((sample + 1) * self.context, self.tokens))]

    def num_targets(self, samples: ArrayLike) -> int:
        """See `WindowPlan.num_targets`."""
        samples = np.asarray(samples, dtype=np.int64)
        starts = samples[samples != EMPTY] * self.context
        before = self.stream.targets_before
        return int(np.sum(before(np.minimum(starts + self.context, self.tokens)) - before(starts)))


def sample_numbers(position: int, count: int, skipped_samples: Sequence[Span] = ()) -> tuple[Int64, int]:
    """The next ``count`` samples of the run from ``position`` on, and the position after them.

    ``skipped_samples``: spans of sample numbers that are passed over, sorted and disjoint.
    """
    pieces, missing = [], count
    for start, stop in skipped_samples:
        if stop <= position or not missing:
            continue
        taken = min(max(start - position, 0), missing)
        pieces.append(np.arange(position, position + taken, dtype=np.int64))
        missing -= taken
        position = position + taken if not missing else stop
    pieces.append(np.arange(position, position + missing, dtype=np.int64))
    return np.concatenate(pieces), position + missing


def merge_spans(spans: Iterable[Sequence[int]]) -> list[Span]:
    """The same numbers as sorted, disjoint spans."""
    merged: list[Span] = []
    for start, stop in sorted((int(start), int(stop)) for start, stop in spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def micro_batches(samples: Sequence[int] | Int64, rank: int, world_size: int, micro_batch: int) -> Int64:
    """The part of a global batch that belongs to ``rank``: (accumulation, micro_batch) sample ids.

    Micro step j of rank r takes samples [(j * world_size + r) * micro_batch, + micro_batch), so one
    optimizer step sees the same samples however they are divided.

    Raises:
        ValueError: the samples cannot be divided so.
    """
    samples = np.asarray(samples, dtype=np.int64)
    if samples.size % (world_size * micro_batch):
        raise ValueError(f"{samples.size} samples do not divide into {world_size} ranks of {micro_batch}")
    return samples.reshape(-1, world_size, micro_batch)[:, rank]


class Request(NamedTuple):
    """One window asked of the dataset, and the number of targets in the whole global batch it belongs to."""

    sample: int
    num_targets: int


class WalkPlan:
    """Endless batch sampler of one rank: its micro batches, step after step, from the samples consumed on.

    Args:
        plan: the order.
        rank, world_size: of the data-parallel group.
        micro_batch: samples per micro batch and rank.
        samples_consumed: asked each time iteration starts, so a sampler made before a checkpoint is loaded
            will do.
        skipped_samples: spans of the run's sample numbers that are not read, asked likewise.
    """

    def __init__(
        self,
        plan: SamplePlan,
        rank: int,
        world_size: int,
        micro_batch: int,
        samples_consumed: Callable[[], int],
        skipped_samples: Callable[[], Sequence[Span]] = tuple,
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.world_size = world_size
        self.batch_size = micro_batch  # the name under which Lightning and DeepSpeed look for it
        self.samples_consumed = samples_consumed
        self.skipped_samples = skipped_samples

    def __iter__(self) -> Iterator[list[Request]]:
        consumed, skipped_samples = self.samples_consumed(), self.skipped_samples()
        while True:
            numbers, consumed = sample_numbers(consumed, self.plan.samples_per_batch, skipped_samples)
            batch = self.plan.ids(numbers)
            num_targets = self.plan.num_targets(batch)
            for samples in micro_batches(batch, self.rank, self.world_size, self.batch_size).tolist():
                yield [Request(sample, num_targets) for sample in samples]


class WalkSequence:
    """Batch sampler of one rank over all windows of a `SequencePlan`, each read by exactly one rank.

    Every rank has the same number of batches, all full: what is missing is made up with `EMPTY` windows.
    ``num_targets`` counts a batch over all ranks.
    """

    def __init__(self, plan: SequencePlan, rank: int, world_size: int, micro_batch: int) -> None:
        self.plan = plan
        self.rank = rank
        self.world_size = world_size
        self.batch_size = micro_batch

    def __len__(self) -> int:
        return -(-self.plan.windows // (self.world_size * self.batch_size))

    def batches(self) -> Iterator[Int64]:
        """The windows of each batch, over all ranks."""
        together = self.world_size * self.batch_size
        for first in range(0, self.plan.windows, together):
            batch = np.arange(first, first + together)
            batch[batch >= self.plan.windows] = EMPTY
            yield batch

    def __iter__(self) -> Iterator[list[Request]]:
        for batch in self.batches():
            num_targets = self.plan.num_targets(batch)
            (samples,) = micro_batches(batch, self.rank, self.world_size, self.batch_size).tolist()
            yield [Request(sample, num_targets) for sample in samples]


def derive_accumulation(tokens_per_batch: int, context: int, micro_batch: int, world_size: int) -> int:
    """Micro steps per optimizer step: tokens_per_batch / (context * micro_batch * world_size).

    Needs nothing but the four numbers, so a contradiction is found before anything starts.

    Raises:
        UserError: a number below 1, or tokens_per_batch is no multiple of the product; the message names the
            nearest batches that are and, where there is one, the micro_batch that keeps tokens_per_batch.
    """
    numbers = {"tokens_per_batch": tokens_per_batch, "context": context, "micro_batch": micro_batch}
    for name, value in {**numbers, "world_size": world_size}.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if tokens_per_batch // context > MAX_SAMPLES_PER_BATCH:
        raise UserError(
            f"tokens_per_batch={tokens_per_batch} makes more than {MAX_SAMPLES_PER_BATCH:,} samples of "
            f"{context} tokens: lower it, or raise context"
        )
    unit = context * micro_batch * world_size
    accumulation, rest = divmod(tokens_per_batch, unit)
    if rest == 0:
        return accumulation
    nearest = " or ".join(f"{n * unit} (accumulation {n})" for n in (accumulation, accumulation + 1) if n > 0)
    message = (
        f"tokens_per_batch={tokens_per_batch} is not a multiple of context * micro_batch * world_size = "
        f"{context} * {micro_batch} * {world_size} = {unit}: the nearest valid values are {nearest}"
    )
    per_rank, uneven = divmod(tokens_per_batch, context * world_size)
    if not uneven and per_rank:
        fitting = max(n for n in range(1, min(micro_batch, per_rank) + 1) if per_rank % n == 0)
        message += f"; or keep it and set micro_batch={fitting}"
    raise UserError(message)
