"""Publishing checkpoints: from a running Trainer to a folder that is whole or not there.

1. At a step boundary every rank takes its part under a hidden name: its partitions, or on rank 0 the one
   file of a state that is not partitioned, and an equal share of the bytes of ``model.safetensors``.
2. Each rank writes its part, hashes it while it does, and flushes it to the disk
   (:mod:`~dualroute.training.checkpointing.publishing.own_part`).
3. Rank 0 is told the hashes.  It adds the model's shape and the tokenizer, writes ``checkpoint.json`` with
   size and hash of every file, and renames the folder to ``step-…``.  Only then do ``last`` and ``best``
   move and old folders go.  The format is :mod:`dualroute.model.checkpoint.folder`'s.

With ``checkpoint.asynchronous`` the ranks copy their parts at the boundary, and the rest happens in a
thread of each (:mod:`~dualroute.training.checkpointing.publishing.background_writer`).  No collective is
started there: the ranks leave their hashes in the folder, where rank 0 looks for them.

Where a step is both validated and saved, the checkpoint is written after the
validation, so that what it resumes into is the next training step and nothing is measured twice or never.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from dualroute import __version__
from dualroute.errors import UserError
from dualroute.files import fsync_folder
from dualroute.model.checkpoint import format as checkpoint_format
from dualroute.model.checkpoint.lineage import total_tokens
from dualroute.model.config import ModelConfig
from dualroute.training.checkpointing import starting_points
from dualroute.training.checkpointing.publishing.background_writer import BackgroundWriter
from dualroute.training.checkpointing.publishing.capture import captured
from dualroute.training.checkpointing.publishing.own_part import (
    Layout,
    Note,
    OwnPart,
    await_notes,
    entries,
    leave_note,
    remove_notes,
)
from dualroute.training.checkpointing.publishing.upkeep import (
    best_by_validation,
    note_published,
    point_links,
    remove,
    set_aside,
)
from dualroute.training.checkpointing.state.layout import StateLayout
from dualroute.training.checkpointing.state.reshard import remove_resharded
from dualroute.training.checkpointing.state.writer import write_failures
from dualroute.training.config import CheckpointConfig
from dualroute.training.finetuning.adapted import is_adapter
from dualroute.training.finetuning.adapters import adapter_files, merged_parameters
from dualroute.training.parallel.agreement import decided_by_rank_zero, told_by_all
from dualroute.training.step.spike_guard import TrainingDiverged

_AFTER_THE_END = 60.0  # seconds that rank 0 waits for the parts of others when its own training has ended


class CheckpointPublisher(Callback):
    """Writes, publishes and retains checkpoints.

    Args:
        folder: The run's ``checkpoints`` folder.
        config: When to write and what to keep.
        tokenizer: Tokenizer file copied into every checkpoint.
        val_every_steps: Optimizer steps between validations (to save after, not before, one).
        described: What every checkpoint says of this run besides; ``validation`` is what its losses were
            measured on, and only those measured on the same are compared.
        patience_minutes: How long rank 0's thread waits for the parts of the others.
        extra: Other files for every checkpoint, by name.

    Attributes:
        lineage: What the checkpoints of this training descend from
            (:mod:`~dualroute.training.checkpointing.starting_points`).
        save_now: Save after the validation that is going on, whatever its step; taken back then.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        tokenizer: Path,
        val_every_steps: int,
        described: dict[str, Any] | None = None,
        patience_minutes: float = 30.0,
        extra: Mapping[str, bytes] | None = None,
    ) -> None:
        self.described = described or {}
        self.extra = extra
        self.patience = 60 * patience_minutes
        self.folder = folder
        self.config = config
        self.tokenizer = tokenizer
        self.val_every_steps = val_every_steps
        self.lineage: list[starting_points.StartingPoint] = []
        self.save_now = False
        self._writer = BackgroundWriter()
        self._published: int | None = None
        self._val_loss: tuple[int, float] | None = None
        self._score: dict[str, Any] | None = None  # of the same validation

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a resumed run starts at a published step
        self._published = trainer.global_step or None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._writer.wait()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, TrainingDiverged):
            self._writer.wait()  # the same processes go on from the newest checkpoint

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._writer.raise_failure()
        if trainer.global_step % self.config.every_steps == 0 and not self.validation_follows(trainer):
            self.publish(trainer, pl_module)

    def validation_follows(self, trainer: Trainer) -> bool:
        """Inside ``on_train_batch_end``: whether the step that was just done is validated next."""
        step = trainer.global_step
        return step % self.val_every_steps == 0 or step == trainer.max_steps

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        step = trainer.global_step
        self._val_loss = (step, pl_module.validation_metrics["loss"])
        self._score = None
        best_by = getattr(pl_module, "best_by", None)
        if best_by is not None:
            name, higher = best_by
            value = float(pl_module.validation_metrics[name])
            self._score = {"name": name, "value": value, "higher_is_better": higher}
        if step % self.config.every_steps == 0 or step == trainer.max_steps or self.save_now:
            self.save_now = False
            self.publish(trainer, pl_module)

    def publish(self, trainer: Trainer, pl_module: Any) -> None:
        """Write and publish the checkpoint of this step, unless that is done.  All ranks, between steps."""
        step = trainer.global_step
        if step == self._published:
            return
        self._published = step
        if self.config.asynchronous:
            self._writer.wait()  # one copy at a time
        aside = self.folder / f".writing-{checkpoint_format.step_folder(step)}"
        layout, config = _weights_layout(pl_module.model), pl_module.model.config
        beside = _adapter_files(pl_module.model, trainer.is_global_zero)
        with _explaining_failures(aside, trainer.global_rank):
            part = self._taken(trainer, pl_module.model, layout, aside)
            metadata = self._metadata(trainer, pl_module, step)
            if self.config.asynchronous:
                self._writer.submit(partial(self._write_later, part, layout, config, metadata, beside))
                return
            # told to all, so that no rank waits for one that has failed
            notes = told_by_all(partial(_written, part))
            decided_by_rank_zero(partial(self._complete, part, layout, config, metadata, notes, beside))

    def _taken(self, trainer: Trainer, model: nn.Module, layout: Layout, aside: Path) -> OwnPart:
        """This rank's part, at a step boundary; all ranks."""
        part = OwnPart(aside, trainer.global_rank, trainer.world_size, later=self.config.asynchronous)
        decided_by_rank_zero(partial(_make_empty, aside))
        with captured(trainer, part):
            trainer.save_checkpoint(aside / checkpoint_format.STATE, weights_only=False)
        copies = part.copied_weights()
        copied = all(f"model.{name}" in copies for name in layout)  # not what is frozen or merged
        weights = ((name, copies[f"model.{name}"]) for name in layout) if copied else gather_weights(model)
        part.take_weights(aside / checkpoint_format.WEIGHTS, layout, weights, copied=copied)
        return part

    def _write_later(
        self,
        part: OwnPart,
        layout: Layout,
        config: ModelConfig,
        metadata: dict[str, Any],
        beside: Mapping[str, bytes] | None = None,
    ) -> None:
        """In a thread of every rank: write its part, and on rank 0 wait for the others' and publish."""
        try:
            note = _written(part)
        except Exception as error:
            if part.rank:
                with suppress(OSError):
                    leave_note(part.folder, part.rank, Note(error=str(error) or type(error).__name__))
            raise
        with _explaining_failures(part.folder, part.rank):
            if part.rank:
                leave_note(part.folder, part.rank, note)
                return
            notes = [note, *await_notes(part.folder, part.ranks, self._seconds_left)]
            remove_notes(part.folder)
            self._complete(part, layout, config, metadata, notes, beside)

    def _seconds_left(self) -> float:
        """Where the training has ended, a rank that says nothing has ended too."""
        return self.patience if threading.main_thread().is_alive() else min(self.patience, _AFTER_THE_END)

    def _metadata(self, trainer: Trainer, pl_module: Any, step: int) -> dict[str, Any]:
        measured = self._val_loss is not None and self._val_loss[0] == step
        metadata = {
            "dualroute": __version__,
            "step": step,
            "max_steps": trainer.max_steps,
            "tokens": pl_module.tokens_seen,
            "token_changes": pl_module.token_count.changes,
            "train_loss": pl_module.step_metrics.get("loss"),
            "val_loss": self._val_loss[1] if measured and self._val_loss else None,
            **({"score": self._score} if measured and self._score else {}),
            "world_size": trainer.world_size,
            "state_layout": str(StateLayout.of(trainer)),
            "context": trainer.datamodule.context,  # type: ignore[attr-defined]
            "data_fingerprint": trainer.datamodule.fingerprint,  # type: ignore[attr-defined]
            "samples_consumed": trainer.datamodule.samples_consumed,  # type: ignore[attr-defined]
            "seed": trainer.datamodule.seed,  # type: ignore[attr-defined]
            starting_points.KEY: self.lineage,
            **self.described,
        }
        return metadata | {"total_tokens": total_tokens(metadata)}

    def _complete(
        self,
        part: OwnPart,
        layout: Layout,
        config: ModelConfig,
        metadata: dict[str, Any],
        notes: Sequence[Note],
        beside: Mapping[str, bytes] | None = None,
    ) -> None:
        """Add what is missing, make it durable, publish it, and retain what is to stay."""
        folder, described = part.folder, entries(notes, checkpoint_format.WEIGHTS, layout)
        for name, content in (beside or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        checkpoint_format.write_description(folder, config, self.tokenizer, metadata, described, self.extra)
        _flush(folder, described)
        published = self.folder / checkpoint_format.step_folder(metadata["step"])
        if os.path.lexists(published):  # copied in part, or not ours: a rename onto it would fail for ever
            set_aside(published)
        os.rename(folder, published)
        fsync_folder(self.folder)
        note_published(self.folder.parent, metadata["step"])
        self._retain()
        remove_resharded(self.folder)

    def _retain(self) -> None:
        point_links(self.folder)
        checkpoints = checkpoint_format.scan_checkpoints(self.folder).finished
        best = best_by_validation(checkpoints).values()
        keep = {c.step for c in [*checkpoints[-self.config.keep_last :], *best]}
        for checkpoint in checkpoints:
            if checkpoint.step not in keep:
                remove(checkpoint.folder)


def gather_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Whole parameters by name, one at a time, whatever ZeRO stage partitioned them.

    With adapters, those of the model that they make.  Collective under ZeRO-3: every rank goes through all of
    them.
    """
    for name, parts, value in merged_parameters(model):
        with _whole(parts):
            yield name, value()


def _weights_layout(model: nn.Module) -> Layout:
    return {
        name: (parts[0].dtype, tuple(getattr(parts[0], "ds_shape", parts[0].shape)))
        for name, parts, _ in merged_parameters(model)
    }


def _adapter_files(model: nn.Module, is_rank_zero: bool) -> dict[str, bytes]:
    """What rank 0 writes of the adapters alone; all ranks."""
    with _whole([parameter for name, parameter in model.named_parameters() if is_adapter(name)]):
        return adapter_files(model) if is_rank_zero else {}


def _make_empty(folder: Path) -> None:
    with _explaining_failures(folder, 0):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def _written(part: OwnPart) -> Note:
    with _explaining_failures(part.folder, part.rank):
        return part.write()


def _flush(folder: Path, flushed: dict[str, Any]) -> None:
    """Make durable what the ranks have not flushed themselves: folders, and rank 0's small files."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_folder(path)
        elif str(path.relative_to(folder)) not in flushed:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    fsync_folder(folder)


@contextmanager
def _whole(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    divided = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if divided:
        import deepspeed

        with deepspeed.zero.GatheredParameters(divided):
            yield
    else:
        yield


@contextmanager
def _explaining_failures(aside: Path, rank: int) -> Iterator[None]:
    """Say what could not be written, and why; rank 0 takes away what is there of it."""
    try:
        with write_failures():
            yield
    except UserError:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    except OSError as error:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        free = shutil.disk_usage(aside.parent).free if aside.parent.exists() else 0
        said = " ".join(str(error).split())[:200]
        # a full disk has several names, and none where another program wrote
        other = error.errno in (errno.ENOENT, errno.EACCES, errno.EROFS)
        remedy = "mend that" if other else "make room"
        raise UserError(
            f"the checkpoint {aside.parent / aside.name.removeprefix('.writing-')} could not be written "
            f"({said}; {free / 2**20:,.0f} MiB are free there): {remedy} and run the same command again, "
            f"it continues from the newest finished checkpoint"
        ) from error
