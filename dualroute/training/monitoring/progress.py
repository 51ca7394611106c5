"""One line that says how far a run is: a moving bar in a terminal, a plain line now and then elsewhere.

It reads the ``step_metrics`` and ``validation_metrics`` that
:class:`dualroute.training.monitoring.monitor.Monitor` describes, on rank zero.  The time left counts
everything, validation and checkpoints too, because that is what somebody who booked hours wants to know;
``speed/*`` of the monitor counts training only, and the two need not agree.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from dualroute.training.monitoring.monitor import perplexity, steps_done

log = logging.getLogger(__name__)

_RECENT_STEPS = 50


def format_count(count: float) -> str:
    """1234567 as 1.23M: three digits and a unit."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def format_time(seconds: float) -> str:
    """3723 as 1:02:03; days in front when there are any."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


class Progress(Callback):
    """Shows step, loss, learning rate, speed and time left.  Use the Trainer with enable_progress_bar=False.

    Args:
        every_seconds: Least time between two plain lines, where the output is no terminal.
        stream: Where to; null is the standard error stream.
        now: Seconds from any origin.
    """

    def __init__(
        self,
        every_seconds: float = 30.0,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.every_seconds = every_seconds
        self._stream = stream
        self._now = now
        self._bar: RichProgress | None = None
        self._console: Console | None = None  # on rank zero, while training
        self._last_step = 0
        self._last_line = -math.inf
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT_STEPS + 1)  # time, tokens

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._console = Console(file=self._stream or sys.stderr, soft_wrap=True, highlight=False)
        self._last_step = steps_done(trainer, pl_module)
        self._last_line = -math.inf
        self._recent.clear()
        self._recent.append((self._now(), 0.0))
        if self._console.is_terminal:
            self._bar = RichProgress(
                BarColumn(bar_width=20), TextColumn("{task.description}"), console=self._console
            )
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._bar.add_task("starting", total=total, completed=self._last_step)
            self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = steps_done(trainer, pl_module)
        if self._console is None or step == self._last_step:
            return
        self._last_step = step
        metrics: dict[str, float] = dict(getattr(pl_module, "step_metrics", {}))
        now = self._now()
        self._recent.append((now, metrics.get("tokens_in_step", 0.0)))
        line = self._line(step, trainer.max_steps, metrics)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, description=line)
        elif step == trainer.max_steps or now - self._last_line >= self.every_seconds:
            self._last_line = now
            self._print(line)

    def _line(self, step: int, total: int, metrics: dict[str, float]) -> str:
        seconds = max(self._recent[-1][0] - self._recent[0][0], 1e-9)
        steps = len(self._recent) - 1
        tokens = sum(tokens for _, tokens in list(self._recent)[1:])
        parts = [f"step {step}/{total}" if total > 0 else f"step {step}"]
        if "loss" in metrics:
            parts.append(f"loss {metrics['loss']:.4f}")
        if "lr" in metrics:
            parts.append(f"lr {metrics['lr']:.2e}")
        parts.append(f"{format_count(tokens / seconds)} tokens/s")
        if metrics.get("skipped_steps"):
            parts.append(f"{metrics['skipped_steps']:.0f} skipped")
        if total > 0:
            parts.append(f"{format_time((total - step) * seconds / steps)} left")
        return "  ".join(parts)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics: dict[str, float] = getattr(pl_module, "validation_metrics", {})
        loss = metrics.get("loss")
        if self._console is not None and not trainer.sanity_checking and loss is not None:
            step = steps_done(trainer, pl_module)
            name, _ = getattr(pl_module, "best_by", None) or ("loss", False)
            shown = f"perplexity {perplexity(loss):.4g}" if name == "loss" else f"{name} {metrics[name]:.4f}"
            self._print(f"step {step}  validation loss {loss:.4f}  {shown}")

    def _print(self, line: str) -> None:
        assert self._console is not None
        self._console.print(line, markup=False)  # above the bar, where there is one
        log.info("%s", line, extra={"on_terminal": True})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._console = None
