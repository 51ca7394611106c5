"""Batches of a task: packed examples, as the trainer of pretraining reads windows.

In: encoded examples.  Here: windows of ``context`` slots are laid out as :mod:`~dualroute.tasks.data.packing`
plans them.  Out: batches for :class:`~dualroute.tasks.module.Finetune`.

Batch: the fields of the examples, (micro_batch, context, …), with ``segment_ids`` (1, 2, … for the examples
of a window, or for the parts of each, where a field ``parts`` counts them from 0; 0 for padding) and
``positions`` (from 0 in each of these), int64; ``num_targets``, as in
pretraining; ``output_rows`` (R,), the places in (micro_batch · context,) whose outputs are wanted; and on the
host ``examples`` (E,), the numbers of the examples, window after window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from dualroute.attention.core.layout import LayoutPlan
from dualroute.data.manifest import canonical_json
from dualroute.data.mixture.config import SourceConfig, lines_over_max_epochs
from dualroute.data.mixture.plan import MixturePlan
from dualroute.data.mixture.schedule import Schedule, turns_of
from dualroute.data.mixture.windows import MixtureWindows
from dualroute.data.plan import Request
from dualroute.data.reader import IGNORE_INDEX, Addition, collate, label_rows
from dualroute.data.window_module import WindowDataModule
from dualroute.tasks.data.examples import Examples
from dualroute.tasks.data.packing import PackedPlan, PackedSequence


@dataclass(frozen=True)
class SourceExamples:
    """A part of the training examples that is mixed with others.

    Attributes:
        config: what it is called, its weight, and how often it may be read.
        examples: how many it has.
    """

    config: SourceConfig
    examples: int


#: What fills a window where no example is; 0 for fields of other names.
FILLS: dict[str, Any] = {"labels": IGNORE_INDEX}


class PackedWindows(Dataset[dict[str, NDArray[Any]]]):
    """Map-style: request → window, a dict of arrays (context, …), ``num_targets`` and ``examples``.

    Args:
        examples: what is packed.
        plan: which of them are in a window.
        fills: {field: value} of empty slots, besides `FILLS`.
    """

    def __init__(
        self, examples: Examples, plan: PackedPlan | PackedSequence, fills: Mapping[str, Any] | None = None
    ) -> None:
        self.examples, self.plan, self.fills = examples, plan, {**FILLS, **(fills or {})}

    def __getitem__(self, request: Request | int) -> dict[str, NDArray[Any]]:
        if not isinstance(request, Request):
            request = Request(request, self.plan.num_targets([request]))
        context = self.plan.context
        numbers = self.plan.examples(request.sample)
        window: dict[str, NDArray[Any]] = {}
        for name, values in self.examples.fields.items():
            dtype = np.int64 if values.dtype.kind in "iu" and values.ndim == 1 else values.dtype
            window[name] = np.full((context, *values.shape[1:]), self.fills.get(name, 0), dtype=dtype)
        segment_ids = np.zeros(context, dtype=np.int64)
        positions = np.zeros(context, dtype=np.int64)
        at = segment = 0
        parts = self.examples.fields.get("parts")
        for number in numbers.tolist():
            start, stop = self.examples.starts[number : number + 2].tolist()
            here = slice(at, at + stop - start)
            for name, values in self.examples.fields.items():
                window[name][here] = values[start:stop]
            lengths = [stop - start] if parts is None else np.bincount(parts[start:stop]).tolist()
            for length in lengths:
                segment += 1
                segment_ids[at : at + length] = segment
                positions[at : at + length] = np.arange(length)
                at += length
        return {
            **window,
            "segment_ids": segment_ids,
            "positions": positions,
            "num_targets": np.array(request.num_targets, dtype=np.int64),
            "examples": numbers,
        }


def collate_examples(
    windows: Sequence[dict[str, NDArray[Any]]],
    *,
    layout: LayoutPlan | None = None,
    part: tuple[int, int] = (0, 1),
    additions: Sequence[Addition] = (),
) -> dict[str, Any]:
    """Windows → batch; see the module's docstring, and for the other arguments `collate`."""
    numbers = [window["examples"] for window in windows]
    batch = collate([{k: v for k, v in window.items() if k != "examples"} for window in windows], layout=None)
    if "labels" not in batch:
        batch["labels"] = torch.full_like(batch["segment_ids"], IGNORE_INDEX)
    if layout is not None:
        batch["layout"] = layout.build(batch["segment_ids"])
        batch["label_rows"] = label_rows(batch["labels"].numpy(), part)
    if "outputs" in batch:
        batch["output_rows"] = torch.from_numpy(np.flatnonzero(batch.pop("outputs").numpy()))
    batch["examples"] = torch.from_numpy(np.concatenate(numbers))
    for addition in additions:
        batch |= addition(batch)
    return batch


class TaskDataModule(WindowDataModule):
    """Training and validation batches of a task's examples.

    Args:
        name: what the data are called in messages.
        train, val: the examples.
        context, micro_batch, tokens_per_batch, seed, num_workers: see `WindowDataModule`.
        val_tokens: validate on so many slots, of rows spread over all; None: on all.
        fills: {field: value} of empty slots.
        sources: what of ``train`` is of which source, in its order, where there are several.
        temperature: of their weights, see ``dualroute.training.config.DataConfig``.
    """

    collate = staticmethod(collate_examples)

    def __init__(
        self,
        name: str,
        train: Examples,
        val: Examples,
        context: int,
        micro_batch: int,
        tokens_per_batch: int,
        seed: int = 0,
        num_workers: int = 0,
        val_tokens: int | None = None,
        fills: Mapping[str, Any] | None = None,
        sources: Sequence[SourceExamples] = (),
        temperature: float = 1.0,
    ) -> None:
        super().__init__(name, context, micro_batch, tokens_per_batch, seed, num_workers)
        self.sources, self.temperature = tuple(sources), temperature
        self.train, self.val, self.val_tokens, self.fills = train, val, val_tokens, fills

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Of the training examples, and of how they are mixed."""
        examples = self.train.fingerprint()
        if not self.sources:
            return examples
        parts = [(source.examples, turns) for source, turns in zip(self.sources, self._turns, strict=True)]
        return hashlib.sha256(canonical_json({"examples": examples, "mixture": parts})).hexdigest()

    @cached_property
    def _turns(self) -> list[int]:
        """Of each source in a period of the mixture."""
        weights = {
            f"{number:04d}": float(source.examples if source.config.weight is None else source.config.weight)
            for number, source in enumerate(self.sources)
        }
        turns = turns_of(weights, self.temperature)
        return [turns.get(key, 0) for key in weights]

    @cached_property
    def val_fingerprint(self) -> str:
        """Of the validation examples."""
        return self.val.fingerprint()

    @cached_property
    def plan(self) -> PackedPlan | MixturePlan:  # type: ignore[override]
        """The order of training."""
        train = self.train
        order = (self.fingerprint, self.seed, self.context, self.samples_per_batch)
        if not self.sources:
            return PackedPlan(train.lengths, train.targets, *order)
        parts, first = [], 0
        for source in self.sources:
            here = slice(first, first + source.examples)
            parts.append(PackedPlan(train.lengths[here], train.targets[here], *order, first=first))
            first += source.examples
        keys = tuple(f"{number:04d}" for number in range(len(parts)))
        return MixturePlan(parts, Schedule(keys, ((0, dict(zip(keys, self._turns, strict=True))),)))

    def epochs_at(self, samples: int) -> dict[str, float]:
        plan = self.plan
        if not isinstance(plan, MixturePlan):
            return super().epochs_at(samples)
        passes = plan.epochs_by_source(samples)
        return {source.config.called: one for source, one in zip(self.sources, passes, strict=True)}

    def over_max_epochs(self, samples: int) -> Iterator[str]:
        yield from lines_over_max_epochs([source.config for source in self.sources], self.epochs_at(samples))

    def source_figures(self) -> dict[str, float]:
        if not isinstance(self.plan, MixturePlan):
            return {}
        names = [source.config.called for source in self.sources]
        return self.plan.figures(names, self.samples_consumed, self.skipped_samples)

    @cached_property
    def val_plan(self) -> PackedSequence:  # type: ignore[override]
        """The windows of validation."""
        examples = self.val
        return PackedSequence(
            examples.lengths, examples.targets, self.context, self.val_tokens, examples.rows
        )

    def train_windows(self) -> Dataset[Any]:
        plan = self.plan
        if isinstance(plan, MixturePlan):
            return MixtureWindows([PackedWindows(self.train, part, self.fills) for part in plan.parts])  # type: ignore[arg-type]
        return PackedWindows(self.train, plan, self.fills)

    def val_windows(self) -> Dataset[Any]:
        return PackedWindows(self.val, self.val_plan, self.fills)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """All but `num_targets` and `examples`, which the host asks for."""
        numbers = batch.pop("examples")
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return {**moved, "examples": numbers}
