"""The folders of a mixture, opened: what they have in common, and how each is read.

In: `SourceConfig`s, or a single path. Here: manifests are loaded and compared; documents may be packed into
rows or told in another order. Out: an `OpenSource` each, with the plans and windows of its splits, of which
`dualroute.data.module` makes those of the mixture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.utils.data import Dataset

from dualroute.data.manifest import Manifest, canonical_json
from dualroute.data.masking import MaskedBatchPlan, MaskedSequentialPlan, MaskedWindows, Masking
from dualroute.data.mixture.config import SourceConfig
from dualroute.data.order.document_stream import DocumentStream
from dualroute.data.order.infill import Infill, InfilledLengths, InfilledReader, mark_ids
from dualroute.data.order.packing import PackedRows, Packing, Use, use_of
from dualroute.data.order.permutation import Shuffle
from dualroute.data.plan import BatchPlan, SequentialPlan
from dualroute.data.reader import IndexedLengths, ShardReader, WindowDataset, open_stream
from dualroute.data.remote.config import BadDataPolicy, RemoteOptions
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError

#: Shards that windows are drawn from at a time, below which a line says that it is little.
FEW_SHARDS = 8


@dataclass(frozen=True)
class Reading:
    """How documents become samples, alike in all sources; see ``dualroute.training.config.DataConfig``."""

    context: int
    samples_per_batch: int
    seed: int
    mask_share: float | None = None
    packing: Packing = "concatenate"
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.5
    fim_tokens: tuple[str, ...] | None = None
    remote: RemoteOptions | None = None
    policy: BadDataPolicy | None = None
    shuffle_tokens: int | None = None


@dataclass(frozen=True, eq=False)
class OpenSource:
    """A folder of shards as a part of a training.

    Attributes:
        config: what it is called, and how often it may be read.
        manifest: of the folder.
        reading: how it is read.
    """

    config: SourceConfig
    manifest: Manifest
    reading: Reading

    @property
    def name(self) -> str:
        return self.config.called

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """That of the folder."""
        return self.manifest.tokenizer.opened(self.manifest.folder)

    @cached_property
    def infill(self) -> Infill | None:
        """How documents are told in another order, if any are.

        Raises:
            UserError: the tokenizer has no tokens for it.
        """
        reading, info = self.reading, self.manifest.tokenizer
        if not reading.fim_rate:
            return None
        return Infill(
            reading.fim_rate,
            reading.fim_spm_rate,
            mark_ids(self.tokenizer, reading.fim_tokens),
            int(info.bos_id >= 0),
            int(info.eos_id >= 0),
            self.manifest.fingerprint,
            reading.seed,
        )

    @cached_property
    def key(self) -> str:
        """sha256 of what decides which samples it has: the manifest's fingerprint where documents are laid
        end to end as they are."""
        content = {"data": self.manifest.fingerprint}
        if self.reading.packing != "concatenate":
            content["packing"] = self.reading.packing
        if self.infill is not None:
            content["infill"] = self._infilled
        if self.shuffle is not None:
            content["shuffle"] = str(self.shuffle.tokens)
        if len(content) == 1:
            return self.manifest.fingerprint
        return hashlib.sha256(canonical_json(content)).hexdigest()

    @property
    def _infilled(self) -> str:
        return (
            "" if self.infill is None else str([self.infill.rate, self.infill.spm_rate, *self.infill.marks])
        )

    @cached_property
    def shuffle(self) -> Shuffle | None:
        """Among how much of it the order is random; null is all."""
        tokens = self.reading.shuffle_tokens
        shards = [shard.tokens for shard in self.manifest.split("train").shards]
        return None if tokens is None else Shuffle(tokens, shards)

    # ------------------------------------------------------------------ training

    @cached_property
    def stream(self) -> DocumentStream:
        """The training documents, as they are read.

        Raises:
            UserError: see `open_stream`.
        """
        if self.infill is None:
            return open_stream(self.manifest, "train")
        self.manifest.check_index("train")
        lengths = IndexedLengths(self.manifest.index_rows("train"))
        return DocumentStream(InfilledLengths(lengths, self.infill))

    @cached_property
    def plan(self) -> BatchPlan | PackedRows:
        """Its order, as if it were alone.

        Raises:
            UserError: the data are unusable or shorter than one window.
        """
        reading = self.reading
        order = (
            self.stream,
            self.manifest.fingerprint,
            reading.seed,
            reading.context,
            reading.samples_per_batch,
        )
        if reading.packing != "concatenate":
            kept_in = self.manifest.folder / ".packing"
            decided_by = "" if self.infill is None else f"{self._infilled} {reading.seed}"
            return PackedRows(*order, reading.packing, kept_in, decided_by, shuffle=self.shuffle)
        try:
            return (
                BatchPlan(*order, shuffle=self.shuffle)
                if reading.mask_share is None
                else MaskedBatchPlan(*order, reading.mask_share, shuffle=self.shuffle)
            )
        except UserError as error:
            raise UserError(f"{self.manifest.place}: {error}") from error

    def windows(self) -> WindowDataset:
        """Request → window of training, without masks."""
        reader: Any = ShardReader(self.manifest, "train")
        if self.infill is not None:
            reader = InfilledReader(reader, self.manifest.index_rows("train"), self.infill)
        return WindowDataset(reader, self.plan, self.reading.policy)

    def shuffle_line(self) -> str | None:
        """What the order is random among, where that is not all."""
        if self.shuffle is None:
            return None
        shards = self.shuffle.shards
        together = max(self.shuffle.tokens * len(shards) // sum(shards), 1)
        if self.shuffle.tokens >= sum(shards):
            return None
        few = ", which is little: neighbours are read together" if together < FEW_SHARDS else ""
        which = f"about {together:,} of {len(shards):,} shards at a time{few}"
        return f"{self.name}: the order is random among {which}"

    def use(self) -> Use:
        """What the packing makes of its documents; reads the index once."""
        return use_of(self.stream, self.reading.context, self.reading.packing, self.plan.windows_per_epoch)

    # ------------------------------------------------------------------ validation

    @property
    def has_validation(self) -> bool:
        """Whether there are held-out documents."""
        return "val" in self.manifest.splits and self.manifest.split("val").documents > 0

    def val_plan(self, limit: int | None) -> SequentialPlan:
        """The windows of validation, end to end whatever the packing; none where nothing is held out."""
        stream = open_stream(self.manifest, "val") if self.has_validation else DocumentStream([])
        order = (stream, self.reading.context, limit)
        share = self.reading.mask_share
        return SequentialPlan(*order) if share is None else MaskedSequentialPlan(*order, share)

    def val_windows(self, plan: SequentialPlan) -> WindowDataset | None:
        """Request → window of validation, without masks; None where nothing is held out."""
        return WindowDataset(ShardReader(self.manifest, "val"), plan) if self.has_validation else None

    # ------------------------------------------------------------------ masks

    @cached_property
    def masking(self) -> Masking | None:
        """How tokens are hidden; None where they are not.

        Raises:
            UserError: the tokenizer cannot be read, or has no id for a hidden token.
        """
        share = self.reading.mask_share
        if share is None:
            return None
        return Masking.of(self.tokenizer, share, self.manifest.fingerprint, self.reading.seed)

    def masked(self, windows: WindowDataset) -> Dataset[Any]:
        """The windows with tokens hidden, where they are."""
        return windows if self.masking is None else MaskedWindows(windows, self.masking)


def open_sources(configs: Sequence[SourceConfig], reading: Reading) -> list[OpenSource]:
    """Open the folders of a mixture.

    Raises:
        UserError: one cannot be used, two hold the same data, or their ids mean different text.
    """
    sources = [OpenSource(config, Manifest.load(config.path, reading.remote), reading) for config in configs]
    first, seen = sources[0], dict[str, OpenSource]()
    for source in sources:
        refuse_other_ids(first.manifest, source.manifest)
        other = seen.setdefault(source.manifest.fingerprint, source)
        if other is not source:
            raise UserError(
                f"data.sources: {source.manifest.place} holds the same data as {other.manifest.place} "
                f"(fingerprint {source.manifest.fingerprint[:12]}…): leave one out"
            )
    return sources


def refuse_other_ids(one: Manifest, other: Manifest) -> None:
    """Raise UserError where the ids of two folders do not mean the same text."""
    if one.tokenizer.sha256 == other.tokenizer.sha256:
        return
    try:
        same = Tokenizer(one.tokenizer_path).same_ids(Tokenizer(other.tokenizer_path))
    except UserError:  # one is missing or damaged, and cannot be compared but by its hash
        same = False
    if not same:
        raise UserError(
            f"data.sources: {other.place} was made with another tokenizer (sha256 "
            f"{other.tokenizer.sha256[:12]}…) than {one.place} ({one.tokenizer.sha256[:12]}…): the ids "
            f"would mean other text; prepare it again with --tokenizer {one.tokenizer_path}"
        )
