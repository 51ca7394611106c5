"""The memory that a run has used, beside what was predicted of it.

In: the configuration before the model is built, and the process as it is then.  Here: after the first step
that has an optimizer's state from its beginning, the second of a start, one line says both, and an event goes
to ``metrics.jsonl``.  Next: whoever chooses the micro-batch of the next run.

On a CPU the libraries and the data are a large part of the process, and nothing that a configuration says.
They are measured before the model is there, and added to what is predicted.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dualroute.errors import UserError
from dualroute.training.config import PretrainConfig
from dualroute.training.memory.parts import Memory, memory_of
from dualroute.training.monitoring.throughput import GIB, memory_statistics

log = logging.getLogger(__name__)


class MemoryCheck(Callback):
    """Compares once; on rank zero.

    Args:
        config: Of the run.
        ranks: Processes.
        device: What they train on.

    Attributes:
        write: Called with (step, {tag: figure}) for ``metrics.jsonl``.
        before: GiB of this process before the model was there.
    """

    def __init__(self, config: PretrainConfig, ranks: int, device: torch.device) -> None:
        self.config, self.ranks, self.device = config, ranks, device
        self.write: Any = None
        self.before = memory_statistics(device)["memory/rss_gib"]
        self._first: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._first is None or not trainer.is_global_zero:
            return
        if trainer.global_step < min(self._first + 2, trainer.max_steps):
            return
        step, self._first = trainer.global_step, None
        predicted = self.predicted(pl_module)
        if predicted is None:
            return
        figures = compared(predicted, self.device, self.before)
        log.info("%s", _line(figures, self.device))
        if self.write is not None:
            self.write(step, figures)

    def predicted(self, pl_module: LightningModule) -> Memory | None:
        """By part; null of a model whose parts are not those of a configuration."""
        teacher = getattr(pl_module, "teacher", None)
        held = 0.0
        if isinstance(teacher, torch.nn.Module):
            held = float(sum(p.numel() * p.element_size() for p in teacher.parameters()))
        try:
            return memory_of(self.config, self.ranks, self.device.type, held)
        except (UserError, ValueError, KeyError):
            return None


def compared(predicted: Memory, device: torch.device, before: float) -> dict[str, float]:
    """GiB that were predicted, by part, and that were measured."""
    measured = memory_statistics(device)
    parts = {f"predicted/{name}_gib": value / GIB for name, value in vars(predicted).items()}
    if device.type == "cuda":  # the context and NCCL are not the allocator's
        total = (predicted.total - predicted.buffers - predicted.fragmentation) / GIB
        return {
            **parts,
            "predicted/peak_gib": total,
            "measured/peak_gib": measured["memory/peak_allocated_gib"],
        }
    return {
        **parts,
        "predicted/libraries_gib": before,
        "predicted/peak_gib": before + predicted.total / GIB,
        "measured/peak_gib": measured["memory/peak_rss_gib"],
    }


def _line(figures: dict[str, float], device: torch.device) -> str:
    predicted, measured = figures["predicted/peak_gib"], figures["measured/peak_gib"]
    where = (
        f" ({figures['predicted/libraries_gib']:.2f} of it libraries and data)"
        if device.type == "cpu"
        else ""
    )
    share = measured / predicted - 1
    return f"peak memory: {measured:.2f} GiB measured, {predicted:.2f} GiB predicted{where}: {share:+.0%}"
