"""The moment at which a start may change the run folder: when its state has loaded, on every rank.

Until then a start only reads, holds the lock (:mod:`~dualroute.training.resilience.run_lock`), writes
heartbeats and perhaps a converted state, so that one that is refused, by whatever part of it, leaves the run
as it was.  Then rank 0, in this order: newer checkpoints are set aside, leftovers of killed processes go, a
roll-back is written down, ``config.yaml`` is replaced.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dualroute.errors import UserError
from dualroute.files import remove_leftovers as remove_temporary_files
from dualroute.files import write_bytes_atomically
from dualroute.model.checkpoint_folder import Checkpoint
from dualroute.training.checkpointing.upkeep import remove_leftovers, set_aside_newer
from dualroute.training.monitoring.tensorboard import TensorBoard
from dualroute.training.parallel.agreement import decided_by_rank_zero

log = logging.getLogger(__name__)


class FirstWrite(Callback):
    """Stands first in the Trainer's list: other callbacks open their files in the same hooks.

    Lightning lets all ranks wait for each other at the end of loading, so that in these hooks each has
    loaded.

    Args:
        output: The run folder.
        config: Text of ``config.yaml``.
        also: What else is to be written, by rank 0.

    Attributes:
        done: It has happened.
        resume: What the run goes on from, if anything.
        converted: The folder of a converted state, if one is loaded.
    """

    def __init__(self, output: Path, config: str, also: Callable[[], None] | None = None) -> None:
        self.output, self.config, self.also = output, config, also
        self.done = False
        self.resume: Checkpoint | None = None
        self.converted: Path | None = None

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._once(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._once(trainer)

    def _once(self, trainer: Trainer) -> None:
        if self.done:
            return
        decided_by_rank_zero(self._write)
        self.done = True
        for logger in trainer.loggers:
            if isinstance(logger, LateTensorBoardLogger):
                logger.may_write = True

    def _write(self) -> None:
        folder = self.output / "checkpoints"
        try:
            if self.resume is not None:
                for path in set_aside_newer(folder, self.resume.step):
                    log.info("%s", f"set aside: {path}")
            if folder.is_dir():
                remove_leftovers(folder, keep=self.converted)
            remove_temporary_files(self.output)
            if self.also is not None:
                self.also()
            write_bytes_atomically(self.output / "config.yaml", self.config.encode())
        except OSError as error:
            raise UserError(
                f"the run folder {self.output} cannot be written ({error.strerror or error}; "
                f"{error.filename or self.output}): make room or give access, and run the same command again"
            ) from error


class LateTensorBoardLogger(TensorBoard):
    """Ours, but without an event file until :class:`FirstWrite` allows it.

    Lightning asks every logger for its ``experiment`` before anything is loaded, if it has one.
    """

    may_write = False

    @property
    def experiment(self) -> Any:
        """The writer."""
        if not self.may_write:
            raise AttributeError("experiment: the run folder may not be written yet")
        return super().experiment

    def save(self) -> None:
        """Flush, if there is something."""
        if self.may_write:
            super().save()
