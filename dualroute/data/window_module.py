"""What all data that are trained on have in common: loaders, and a position that is saved and restored.

In: a plan (which samples, in which order) and the windows that it asks for, which a subclass knows:
:class:`~dualroute.data.module.ShardDataModule` cuts them out of a stream of text,
:class:`dualroute.tasks.data.module.TaskDataModule` packs the examples of a task into them.  Here: they are
divided among ranks and micro batches, and counted.  Out: batches for the training module's ``training_step``,
which calls `WindowDataModule.advance` once per optimizer step.

The position is the number of samples trained on, not the number that the loader has
fetched. Lightning does not fast-forward a loader on resume, and need not: the loader starts where
``samples_consumed`` says.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from dualroute.attention.core.layout import LayoutPlan
from dualroute.data.plan import (
    SamplePlan,
    SequencePlan,
    Span,
    WalkPlan,
    WalkSequence,
    derive_accumulation,
    merge_spans,
    sample_numbers,
)
from dualroute.data.reader import Addition, collate
from dualroute.errors import UserError

Batch = dict[str, Any]
MAX_WORKERS = 1024


class WindowDataModule(pl.LightningDataModule):
    """Training and validation batches of windows of ``context`` slots.

    The order depends on (data, seed, context) alone: not on the number of ranks, workers or micro batches,
    nor on how often the run was stopped. Set ``use_distributed_sampler=False`` and
    ``accumulate_grad_batches=accumulation`` on the Trainer.

    Args:
        name: what the data are called in messages.
        context: slots per sample.
        micro_batch: samples per rank in one forward pass.
        tokens_per_batch: slots per optimizer step over all ranks; a multiple of context * micro_batch *
            world size.
        seed: of the order.
        num_workers: processes that read ahead; 0 reads in the training process.

    Attributes:
        samples_consumed: position in the run's samples, over all ranks; see `advance`.
        skipped_samples: spans of these samples that are passed over, because training on them failed.
    """

    def __init__(
        self,
        name: str,
        context: int,
        micro_batch: int,
        tokens_per_batch: int,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= num_workers <= MAX_WORKERS:
            raise UserError(f"num_workers must be from 0 to {MAX_WORKERS}, not {num_workers}")
        derive_accumulation(tokens_per_batch, context, micro_batch, world_size=1)
        self.data_name = name
        self.context = context
        self.micro_batch = micro_batch
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        self.num_workers = num_workers
        self.samples_consumed = 0
        self.skipped_samples: list[Span] = []
        #: of the model that is trained; the loaders' processes then lay out the documents of each batch
        self.layout_plan: LayoutPlan | None = None
        #: (rank, ranks) of those that share each text; `label_rows` are those of this rank's part
        self.text_part = (0, 1)
        #: what else these processes work out of a batch
        self.additions: tuple[Addition, ...] = ()

    # ------------------------------------------------------------------ what a subclass knows

    #: sha256 of all that decides which samples there are
    fingerprint: str
    #: the order of training
    plan: SamplePlan
    #: the windows of validation
    val_plan: SequencePlan

    @property
    def val_fingerprint(self) -> str:
        """sha256 of what is validated on, with ``val_plan``."""
        return self.fingerprint

    def train_windows(self) -> Dataset[Any]:
        """Request → window of the training data."""
        raise NotImplementedError

    def val_windows(self) -> Dataset[Any]:
        """Request → window of the validation data."""
        raise NotImplementedError

    def targets_per_byte(self, split: str) -> float | None:
        """Targets per UTF-8 byte of text: nats per target times this is nats per byte.  Null where targets
        are not text."""
        return None

    #: windows → batch
    collate = staticmethod(collate)

    # ------------------------------------------------------------------ several sources

    #: names of the sources that validation batches are of, one each; none where there is one
    val_sources: tuple[str, ...] = ()
    #: of each of them, see `targets_per_byte`
    val_targets_per_byte: tuple[float | None, ...] = ()

    def source_figures(self) -> dict[str, float]:
        """{tag: figure} of what has been read of each source so far; none where there is one."""
        return {}

    def describe_order(self) -> dict[str, Any]:
        """What ``checkpoint.json`` says of the mixture, if there is one."""
        return {}

    def stages_for_people(self) -> list[dict[str, Any]]:
        """One table for each stage of the mixture."""
        return []

    def order_lines(self) -> Iterator[str]:
        """What is said of mixture and packing at the start."""
        return iter(())

    def epochs_at(self, samples: int) -> dict[str, float]:
        """Passes over each source, by name, that the first ``samples`` samples of the run make."""
        return {self.data_name: self.plan.epochs(samples)}

    def over_max_epochs(self, samples: int) -> Iterator[str]:
        """A line for each source that the first ``samples`` samples of the run read too often."""
        return iter(())

    def refuse_other_past(self, metadata: Mapping[str, Any], where: str) -> None:
        """Raise UserError where what a checkpoint has been trained on is not what this module would have read
        until there.

        Args:
            metadata: of the checkpoint.
            where: it lies, for the message.
        """

    # ------------------------------------------------------------------ arithmetic

    @property
    def samples_per_batch(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.tokens_per_batch // self.context

    @property
    def accumulation(self) -> int:
        """Micro batches per optimizer step, for the trainer's world size.

        Raises:
            UserError: tokens_per_batch cannot be divided so.
        """
        return derive_accumulation(self.tokens_per_batch, self.context, self.micro_batch, self._place()[1])

    @property
    def epoch(self) -> float:
        """Passes over the training data so far; see `BatchPlan.epochs`."""
        return self.plan.epochs(self.samples_consumed)

    def setup(self, stage: str | None = None) -> None:
        """Find what is wrong with data and batch arithmetic before the first step.

        Raises:
            UserError: see `plan` and `accumulation`; or the Trainer accumulates another number of micro
                batches.
        """
        if stage not in ("fit", None):
            return
        _ = self.plan, self.accumulation
        if self.trainer is not None and self.trainer.lightning_module.automatic_optimization:
            configured = self.trainer.accumulate_grad_batches
            if configured != self.accumulation:
                raise UserError(
                    f"the trainer has accumulate_grad_batches={configured}, but "
                    f"tokens_per_batch={self.tokens_per_batch} needs {self.accumulation} "
                    f"(context={self.context}, micro_batch={self.micro_batch}, world size {self._place()[1]})"
                )

    def train_dataloader(self) -> DataLoader[Any]:
        """Endless; each new iterator starts at ``samples_consumed``."""
        sampler = self.train_sampler(*self._place())  # first: what it says of missing data is clearer
        return self._loader(self.train_windows(), sampler)

    def train_sampler(self, rank: int, world_size: int) -> Any:
        """Which training windows a rank reads, batch by batch."""
        return WalkPlan(
            self.plan,
            rank,
            world_size,
            self.micro_batch,
            lambda: self.samples_consumed,
            lambda: self.skipped_samples,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Every validation window once over all ranks, in order; as many batches on every rank.

        Windows without labels (segment_ids all 0) make up what is missing; ``num_targets`` counts one batch
        over all ranks.

        Raises:
            UserError: there are no validation data.
        """
        sampler = self.val_sampler(*self._place())
        return self._loader(self.val_windows(), sampler)

    def val_sampler(self, rank: int, world_size: int) -> Any:
        """Which validation windows a rank reads."""
        return WalkSequence(self.val_plan, rank, world_size, self.micro_batch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """All but `num_targets`, which the host would have to ask for again."""
        on_host = batch.pop("num_targets")
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return {**moved, "num_targets": on_host}

    def advance(self) -> None:
        """Count one global batch as trained on; to be called once per optimizer step."""
        _, self.samples_consumed = sample_numbers(
            self.samples_consumed, self.samples_per_batch, self.skipped_samples
        )

    def state_dict(self) -> dict[str, Any]:
        """The position and what it is a position in, as plain JSON values."""
        state: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "context": self.context,
            "samples_per_batch": self.samples_per_batch,
            "samples_consumed": self.samples_consumed,
        }
        if self.skipped_samples:
            # the name that checkpoints have had from the beginning
            state["left_out"] = [list(span) for span in self.skipped_samples]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        World size, micro_batch and tokens_per_batch may differ from the saved run: samples are
        counted one by one.

        Raises:
            UserError: the saved run had other data, another seed or another context; or a key is missing or
                of a wrong type. Nothing has changed then.
        """
        mine = self.state_dict()
        for key in ("fingerprint", "seed", "context", "samples_consumed"):
            if key not in state_dict:
                raise UserError(
                    f"the checkpoint's data state has no {key!r}: this data module did not write it"
                )
            if key != "samples_consumed" and state_dict[key] != mine[key]:
                raise UserError(
                    f"the checkpoint was trained with data {key} {state_dict[key]!r}, but "
                    f"{self.data_name} is opened with {mine[key]!r}: resume with the same data, seed and "
                    "context, or start a new run"
                )
        consumed, skipped_samples = state_dict["samples_consumed"], state_dict.get("left_out", [])
        if not _is_position(consumed):
            raise UserError(
                f"the checkpoint's data state has samples_consumed {consumed!r:.80}, which is no number of "
                "samples: the checkpoint is damaged, resume from another"
            )
        if not isinstance(skipped_samples, list | tuple) or not all(map(_is_span, skipped_samples)):
            raise UserError(
                f"the checkpoint's data state has left_out {skipped_samples!r:.80}, which are no spans of "
                "samples: the checkpoint is damaged, resume from another"
            )
        self.samples_consumed = consumed
        # what this module was told to leave out stays: a roll-back knows more than the checkpoint it goes to
        self.skipped_samples = merge_spans([*self.skipped_samples, *skipped_samples])

    def _place(self) -> tuple[int, int]:
        """(rank, size) of the data-parallel group; (0, 1) without a trainer.

        Asks the strategy as Lightning does for its own samplers: ranks that share a sample (sequence
        parallelism) must be given the same data, and only the strategy knows which those are.
        """
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)

    def _loader(self, dataset: Dataset[Any], sampler: Any) -> DataLoader[Any]:
        return TimedLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=partial(
                self.collate, layout=self.layout_plan, part=self.text_part, additions=self.additions
            ),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class TimedLoader(DataLoader[Any]):
    """A `DataLoader` that counts the seconds for which it was waited for.

    Attributes:
        waited: Seconds since it was made, of all passes.
    """

    waited = 0.0

    def __iter__(self) -> Any:
        batches = super().__iter__()
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)  # no batch is None
            self.waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch


def _is_position(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _is_span(value: Any) -> bool:
    """Whether a value from a checkpoint is a [start, stop) of sample numbers."""
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(map(_is_position, value))
        and value[0] <= value[1]
    )
