"""Ending a run whose validations get no better.

In: the figure of each validation that the module goes by (``best_by``).  Here: :class:`EarlyStopping` counts
validations in a row without a better one.  Next: the publisher writes the checkpoint that the run ends with,
and says so in its metadata, so that the same command, run again, finds a finished run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, Trainer

from dualroute.training.checkpointing.publishing.publisher import CheckpointPublisher
from dualroute.training.finetuning.config import StrategyConfig

log = logging.getLogger(__name__)
KEY = "stopped_early"  #: in ``checkpoint.json``


class EarlyStopping(Callback):
    """Stands before the publisher in the Trainer's list, which then saves what is decided here.

    Each validation that is the best so far is saved, whatever ``checkpoint.every_steps`` is.

    Args:
        patience: Validations in a row without a better one that end the run.
        min_improvement: By how much better is better.
        publisher: Is told when to save out of turn.

    Attributes:
        best: The best figure so far; null before the first validation.
        best_step: Where.
        waited: Validations since.
    """

    def __init__(self, patience: int, min_improvement: float, publisher: CheckpointPublisher) -> None:
        self.patience, self.min_improvement, self.publisher = patience, min_improvement, publisher
        self.best: float | None = None
        self.best_step = self.waited = 0
        self._seen = -1

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or trainer.global_step == self._seen:
            return
        name, higher = pl_module.best_by or ("loss", False)
        step, value = trainer.global_step, float(pl_module.validation_metrics[name])
        self._seen = step
        if self._better(value, higher):
            self.best, self.best_step, self.waited = value, step, 0
            self.publisher.save_now = True
            return
        self.waited += 1
        if self.waited < self.patience or step >= trainer.max_steps:
            return
        self.publisher.described = {
            **self.publisher.described,
            KEY: {"metric": name, "best": self.best, "best_step": self.best_step, "waited": self.waited},
        }
        self.publisher.save_now = True
        trainer.should_stop = True
        if trainer.is_global_zero:
            log.info(
                "%s",
                f"stopped early at step {step}: {self.waited} validations without a better {name} than "
                f"{_shown(self.best)} at step {self.best_step} (checkpoints/best)",
            )

    def _better(self, value: float, higher: bool) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        gain = value - self.best if higher else self.best - value
        return gain > self.min_improvement

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited, "seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self.waited, self._seen = state_dict["waited"], state_dict["seen"]


def has_stopped(metadata: Mapping[str, Any], patience: int | None) -> bool:
    """Whether the run of a checkpoint has ended early, and would with this ``patience`` too."""
    said = metadata.get(KEY)
    return patience is not None and isinstance(said, Mapping) and int(said.get("waited", 0)) >= patience


def _shown(value: float | None) -> str:
    return "any" if value is None else f"{value:.4g}"


def early_stopping(config: StrategyConfig, publisher: CheckpointPublisher) -> list[Callback]:
    """The callback of a run, if it has one."""
    if config.early_stopping is None:
        return []
    return [EarlyStopping(config.early_stopping, config.min_improvement, publisher)]
