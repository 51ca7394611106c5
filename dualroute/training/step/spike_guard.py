"""May the loss of this step be trusted?  A guard that skips the step of a bad batch, and ends a run that
only skips.

In: the all-reduced loss of each step, from :mod:`~dualroute.training.step.step_guard`.  Next: a step that
is skipped, or :class:`TrainingDiverged`, after which :mod:`~dualroute.training.resilience.rollback` goes
back to a checkpoint.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from dualroute.errors import UserError
from dualroute.training.config import SpikeGuardConfig


class TrainingDiverged(UserError):
    """The loss has been unusable for too many steps in a row."""


class SpikeGuard:
    """Decides, from numbers alone, which steps are skipped.

    Every rank feeds it the same all-reduced loss and gradient norm, so every rank decides alike without
    talking.  A step is skipped when either is not finite, or stands more than ``threshold`` robust standard
    deviations (1.4826 · median absolute deviation) above the median of the last ``window`` good steps; the
    norm is compared on a logarithmic scale, on which it is roughly symmetric.  Skipped steps never enter the
    window.  The idea is that of OLMo-core's SkipStepOptimizer, with the median in place of the mean: in early
    training one large value would widen a plain standard deviation for a whole window.
    """

    # below these a "spike" is noise of a very even run: nats, and natural log units of the norm
    _LEAST_LOSS_DEVIATION = 0.05
    _LEAST_NORM_DEVIATION = 0.1

    def __init__(self, config: SpikeGuardConfig | None = None) -> None:
        self.config = config or SpikeGuardConfig()
        self.skipped = 0  # steps skipped since the beginning of the run
        self.reason = ""  # why the last step was skipped; empty when it was not
        self._in_a_row = 0
        self._losses: deque[float] = deque(maxlen=self.config.window)
        self._log_norms: deque[float] = deque(maxlen=self.config.window)

    def should_skip(self, loss: float, grad_norm: float | None = None) -> bool:
        """Judge one step and remember it; ``reason`` says why it is skipped.

        Args:
            loss: Mean loss of the global batch, in nats, the same number on every rank.
            grad_norm: Norm of the whole gradient before clipping, likewise, where it is known.

        Raises:
            TrainingDiverged: This is the ``patience``-th step in a row to be skipped.
        """
        self.reason = self._judge(loss, grad_norm)
        if not self.reason:
            self._in_a_row = 0
            self._losses.append(loss)
            if grad_norm is not None:
                self._log_norms.append(_log(grad_norm))
            return False
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= self.config.patience:
            raise TrainingDiverged(
                f"{self._in_a_row} steps in a row were unusable (the last: {self.reason}): "
                f"resume from an earlier checkpoint with a lower optim.lr, or look at the data"
            )
        return True

    def _judge(self, loss: float, grad_norm: float | None) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        if not self.config.enabled:
            return ""
        limit = self._limit(self._losses, self._LEAST_LOSS_DEVIATION)
        if loss > limit:
            return f"the loss {loss:.4g} is above {limit:.4g}, the limit from recent steps"
        limit = self._limit(self._log_norms, self._LEAST_NORM_DEVIATION)
        if grad_norm is not None and _log(grad_norm) > limit:
            limit = math.exp(limit)
            return f"the gradient norm {grad_norm:.4g} is above {limit:.4g}, the limit from recent steps"
        return ""

    def _limit(self, recent: deque[float], least_deviation: float) -> float:
        if len(recent) < self.config.window:
            return math.inf
        median = statistics.median(recent)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in recent)
        return median + self.config.threshold * max(deviation, least_deviation)

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state; a run resumed from it decides as if it had never stopped."""
        return {
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "losses": list(self._losses),
            "log_norms": list(self._log_norms),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; a smaller window keeps the newest steps."""
        self.skipped = int(state["skipped"])
        self._in_a_row = int(state["in_a_row"])
        self._losses = deque(state["losses"], maxlen=self.config.window)
        self._log_norms = deque(state["log_norms"], maxlen=self.config.window)


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))
