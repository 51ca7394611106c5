"""Publishing checkpoints: from a running Trainer to a folder that is whole or not there.

At a step boundary every rank writes its part under a hidden name; rank zero adds the whole weights, the
model's shape and the tokenizer, flushes everything to the disk, writes ``checkpoint.json`` with the size
and sha256 of every file, and renames the folder to ``step-…``.  Only then do ``last`` and ``best`` move and
old folders go.  The format is :mod:`dualroute.model.checkpoint_format`'s.

With ``checkpoint.asynchronous`` one process and DDP only copy their state at the boundary; the rest
happens in a thread (:mod:`~dualroute.training.checkpointing.background_writer`).

Where a step is both validated and saved, the checkpoint is written after the
validation, so that what it resumes into is the next training step and nothing is measured twice or never.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from dualroute import __version__
from dualroute.errors import UserError
from dualroute.files import fsync_folder, make_durable
from dualroute.model import checkpoint_format
from dualroute.model.config import ModelConfig
from dualroute.model.lineage import total_tokens
from dualroute.model.weights_file import write_weights
from dualroute.training.checkpointing import starting_points
from dualroute.training.checkpointing.background_writer import BackgroundWriter, StateCapture
from dualroute.training.checkpointing.reshard import remove_resharded
from dualroute.training.checkpointing.state_file import saving_with
from dualroute.training.checkpointing.state_layout import StateLayout
from dualroute.training.checkpointing.upkeep import (
    best_by_validation,
    note_published,
    point_links,
    remove,
    set_aside,
)
from dualroute.training.config import CheckpointConfig


class CheckpointPublisher(Callback):
    """Writes, publishes and retains checkpoints.

    Args:
        folder: The run's ``checkpoints`` folder.
        config: When to write and what to keep.
        tokenizer: Tokenizer file copied into every checkpoint.
        val_every_steps: Optimizer steps between validations (to save after, not before, one).
        described: What every checkpoint says of this run besides; ``validation`` is what its losses were
            measured on, and only those measured on the same are compared.

    Attributes:
        lineage: What the checkpoints of this training descend from
            (:mod:`~dualroute.training.checkpointing.starting_points`).
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        tokenizer: Path,
        val_every_steps: int,
        described: dict[str, Any] | None = None,
    ) -> None:
        self.described = described or {}
        self.folder = folder
        self.config = config
        self.tokenizer = tokenizer
        self.val_every_steps = val_every_steps
        self.lineage: list[starting_points.StartingPoint] = []
        self._writer = BackgroundWriter()
        self._published: int | None = None
        self._val_loss: tuple[int, float] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a resumed run starts at a published step
        self._published = trainer.global_step or None
        if self.config.asynchronous and isinstance(trainer.strategy, DeepSpeedStrategy):
            rank_zero_warn("checkpoint.asynchronous has no effect with DeepSpeed, which writes its own files")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._writer.wait()

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
        if step % self.config.every_steps == 0 or step == trainer.max_steps:
            self.publish(trainer, pl_module)

    def publish(self, trainer: Trainer, pl_module: Any) -> None:
        """Write and publish the checkpoint of this step, unless that is done.  All ranks, between steps."""
        step = trainer.global_step
        if step == self._published:
            return
        self._published = step
        if self.config.asynchronous and not isinstance(trainer.strategy, DeepSpeedStrategy):
            self._publish_later(trainer, pl_module, step)
            return
        aside = self.folder / f".writing-{checkpoint_format.step_folder(step)}"
        with _explaining_failures(aside):
            if trainer.is_global_zero:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            trainer.strategy.barrier("checkpoint folder made")
            trainer.save_checkpoint(aside / checkpoint_format.STATE, weights_only=False)
            weights = gather_weights(pl_module.model)
            if trainer.is_global_zero:
                write_weights(aside / checkpoint_format.WEIGHTS, _weights_layout(pl_module.model), weights)
            else:
                deque(weights, maxlen=0)  # takes part in gathering, keeps nothing
            trainer.strategy.barrier("checkpoint parts written")
            if trainer.is_global_zero:
                self._complete(aside, pl_module.model.config, self._metadata(trainer, pl_module, step))
        trainer.strategy.barrier("checkpoint published")

    def _publish_later(self, trainer: Trainer, pl_module: Any, step: int) -> None:
        """Copy the state; the writer's thread does the rest.  Plain files only: rank zero holds all of it."""
        self._writer.wait()  # one copy at a time
        aside = self.folder / f".writing-{checkpoint_format.step_folder(step)}"
        capture = StateCapture()
        with saving_with(trainer, capture):
            trainer.save_checkpoint(aside / checkpoint_format.STATE, weights_only=False)
        if capture.state is not None:
            metadata, layout = self._metadata(trainer, pl_module, step), _weights_layout(pl_module.model)
            config = pl_module.model.config
            self._writer.submit(partial(self._write, aside, capture.state, layout, config, metadata))

    def _write(
        self,
        aside: Path,
        state: dict[str, Any],
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        config: ModelConfig,
        metadata: dict[str, Any],
    ) -> None:
        with _explaining_failures(aside):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            torch.save(state, aside / checkpoint_format.STATE)
            weights = ((name, state["state_dict"][f"model.{name}"]) for name in layout)
            write_weights(aside / checkpoint_format.WEIGHTS, layout, weights)
            self._complete(aside, config, metadata)

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
            "world_size": trainer.world_size,
            "state_layout": str(StateLayout.of(trainer)),
            "context": trainer.datamodule.context,  # type: ignore[attr-defined]
            "data_fingerprint": trainer.datamodule.manifest.fingerprint,  # type: ignore[attr-defined]
            "seed": trainer.datamodule.seed,  # type: ignore[attr-defined]
            starting_points.KEY: self.lineage,
            **self.described,
        }
        return metadata | {"total_tokens": total_tokens(metadata)}

    def _complete(self, folder: Path, config: ModelConfig, metadata: dict[str, Any]) -> None:
        """Add what is missing, make it durable, publish it, and retain what is to stay."""
        checkpoint_format.write_description(folder, config, self.tokenizer, metadata)
        make_durable(folder)
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

    Collective under ZeRO-3: every rank goes through all of them.
    """
    for name, parameter in model.named_parameters():
        with _whole(parameter):
            yield name, parameter.detach()


def _weights_layout(model: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {n: (p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for n, p in model.named_parameters()}


@contextmanager
def _whole(parameter: nn.Parameter) -> Iterator[None]:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield
    else:
        yield


@contextmanager
def _explaining_failures(aside: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its zip writer; anything else is not ours to explain
        signs = ("PytorchStreamWriter", "inline_container")  # the latter where it writes to a path
        is_write_error = isinstance(error, OSError) or any(sign in str(error) for sign in signs)
        shutil.rmtree(aside, ignore_errors=True)
        if not is_write_error:
            raise
        free = shutil.disk_usage(aside.parent).free if aside.parent.exists() else 0
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"the checkpoint {aside.parent / aside.name.removeprefix('.writing-')} could not be written "
            f"({said}; {free / 2**20:,.0f} MiB are free there): make room and run the same command again, "
            f"it continues from the newest finished checkpoint"
        ) from error
