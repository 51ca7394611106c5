"""The shards as Lightning sees them: which windows are read, in which order.

In: the path of a dataset folder and the batch arithmetic. Here: `plan` (which samples, in which order) and
`reader` (their tensors) are put together. Out: batches for the training module's ``training_step``, by the
loaders of :class:`~dualroute.data.window_module.WindowDataModule`.

Batch: ``input_ids``, ``labels``, ``segment_ids``, ``positions``, int64 (micro_batch, context), as
`WindowDataset` describes them, and ``num_targets``, 0-dim int64: labels to predict in the whole step, over
all ranks and micro batches. A loss summed over its own labels and divided by ``num_targets`` adds up to the
global mean without communication. `num_targets` stays on the host, which divides by it. With a
``mask_share`` labels are tokens that were hidden, see `dualroute.data.masking`. A module that sets
``layout_plan`` also gets ``layout`` and ``label_rows``, see `dualroute.data.reader.collate`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from dualroute.data.manifest import Manifest
from dualroute.data.masking import MaskedBatchPlan, MaskedSequentialPlan, MaskedWindows, Masking
from dualroute.data.order.document_stream import Span
from dualroute.data.plan import BatchPlan, Request, SequentialPlan, WindowPlan
from dualroute.data.reader import ShardReader, WindowDataset, open_stream
from dualroute.data.remote.config import BadDataPolicy, RemoteOptions
from dualroute.data.remote.prefetch import read_ahead
from dualroute.data.tokenizer import Tokenizer
from dualroute.data.verify import verify_once
from dualroute.data.window_module import MAX_WORKERS, Batch, WindowDataModule
from dualroute.errors import UserError

__all__ = ["MAX_WORKERS", "Batch", "ShardDataModule", "WindowDataModule"]


class ShardDataModule(WindowDataModule):
    """Training and validation batches of a dataset folder made by `dualroute prepare`.

    Args:
        path: the dataset folder.
        context, micro_batch, tokens_per_batch, seed, num_workers: see `WindowDataModule`.
        val_tokens: validate on the first so many tokens of the split ``val``; None: on all of them.
        verify: ``size`` checks the files' sizes at start, ``sha256`` also their contents (once per copy
            of the data).
        mask_share: of the tokens that are hidden, to be found from both sides; None: labels are next tokens.
        remote: how a set that lies elsewhere is read; None for the defaults.
        prefetch_shards: shards of such a set that are brought before they are needed.
        policy: what becomes of windows that cannot be read; None: the run ends.

    Attributes:
        bad_windows: training windows that were skipped since the start, on this rank.
    """

    def __init__(
        self,
        path: str | Path,
        context: int,
        micro_batch: int,
        tokens_per_batch: int,
        seed: int = 0,
        num_workers: int = 0,
        val_tokens: int | None = None,
        verify: Literal["size", "sha256"] = "size",
        mask_share: float | None = None,
        remote: RemoteOptions | None = None,
        prefetch_shards: int = 4,
        policy: BadDataPolicy | None = None,
    ) -> None:
        if verify not in ("size", "sha256"):
            raise UserError(f"verify must be 'size' or 'sha256', not {verify!r}")
        if mask_share is not None and not 0 < mask_share <= 1:
            raise UserError(f"mask_share must be above 0 and at most 1, not {mask_share}")
        super().__init__(str(path), context, micro_batch, tokens_per_batch, seed, num_workers)
        self.path = str(path)
        self.remote, self.prefetch_shards, self.policy = remote, prefetch_shards, policy or BadDataPolicy()
        self.bad_windows = 0
        self.val_tokens = val_tokens
        self.verify = verify
        self.mask_share = mask_share
        #: makes the training windows into a dataset that adds to them (a teacher's logits, say)
        self.extend: Callable[[WindowDataset], Dataset[Any]] | None = None

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest, read on first use."""
        return Manifest.load(self.path, self.remote)

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """The manifest's."""
        return self.manifest.fingerprint

    @cached_property
    def plan(self) -> BatchPlan:  # type: ignore[override]
        """The order of training, made on first use.

        Raises:
            UserError: the data are unusable or shorter than one window.
        """
        stream = open_stream(self.manifest, "train")
        order = (stream, self.manifest.fingerprint, self.seed, self.context, self.samples_per_batch)
        return BatchPlan(*order) if self.mask_share is None else MaskedBatchPlan(*order, self.mask_share)

    @cached_property
    def val_plan(self) -> SequentialPlan:  # type: ignore[override]
        """The windows of validation, made on first use.

        Raises:
            UserError: there are no validation documents.
        """
        if "val" not in self.manifest.splits or not self.manifest.split("val").documents:
            raise UserError(
                f"{self.path}: the split 'val' has no documents; prepare the data with a validation share, "
                "or train without validation (limit_val_batches=0)"
            )
        order = (open_stream(self.manifest, "val"), self.context, self.val_tokens)
        return (
            SequentialPlan(*order)
            if self.mask_share is None
            else MaskedSequentialPlan(*order, self.mask_share)
        )

    @cached_property
    def masking(self) -> Masking | None:
        """How tokens are hidden, made on first use; None where they are not.

        Raises:
            UserError: the tokenizer cannot be read, or has no id for a hidden token.
        """
        if self.mask_share is None:
            return None
        tokenizer = Tokenizer(self.manifest.folder / self.manifest.tokenizer.file)
        return Masking.of(tokenizer, self.mask_share, self.manifest.fingerprint, self.seed)

    def targets_per_byte(self, split: str) -> float:
        """See `WindowDataModule.targets_per_byte`."""
        return self.manifest.split(split).targets_per_byte

    def prepare_data(self) -> None:
        """Check the files; Lightning calls it on one rank per node."""
        verify_once(self.manifest, self.verify, self.policy)

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if stage in ("fit", None):
            _ = self.masking

    def train_windows(self) -> Dataset[Any]:
        windows = WindowDataset(ShardReader(self.manifest, "train"), self.plan, self.policy)
        return self._masked(windows) if self.extend is None else self.extend(windows)

    def val_windows(self) -> Dataset[Any]:
        return self._masked(WindowDataset(ShardReader(self.manifest, "val"), self.val_plan))

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = self._ahead(self.train_sampler(), "train", self.plan)
        return self._loader(self.train_windows(), sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        sampler = self._ahead(self.val_sampler(), "val", self.val_plan)
        return self._loader(self.val_windows(), sampler)

    def _ahead(self, sampler: Any, split: str, plan: WindowPlan) -> Any:
        """The sampler, which has the shards of a set elsewhere brought before they are needed."""
        mirror = self.manifest.mirror
        if mirror is None or not self.prefetch_shards:
            return sampler

        def spans(batch: list[Request]) -> list[Span]:
            return [span for request in batch for span in plan.spans(request.sample)]

        return read_ahead(sampler, spans, mirror, self.manifest.split(split).shards, self.prefetch_shards)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Count the windows that were skipped.

        Raises:
            UserError: they are more than the policy allows.
        """
        if (skipped := batch.pop("skipped", None)) is not None and (count := int(skipped.sum())):
            self.bad_windows += count
            if self.bad_windows > self.policy.max_bad_windows:
                raise UserError(
                    f"{self.path}: {self.bad_windows} windows could not be read since the start, more than "
                    f"data.max_bad_windows {self.policy.max_bad_windows} (the warnings above name their shards); "
                    "mend the data, or allow more"
                )
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _masked(self, windows: WindowDataset) -> Dataset[Any]:
        return windows if self.masking is None else MaskedWindows(windows, self.masking)
