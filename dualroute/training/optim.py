"""What turns gradients into a step: parameter groups, AdamW, the learning rate's course, and a guard.

The LightningModule's ``configure_optimizers`` calls :func:`build_optimizer`; before each step it writes
:func:`lr_at` into the optimizer and asks a :class:`SpikeGuard` whether the (all-reduced) loss of this step
may be trusted.

Under ZeRO-3 a parameter's own shape is empty, its real one stands in ``ds_shape``.
Whoever decides by ``param.ndim`` what is decayed would then decay nothing at all.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dualroute.errors import UserError


@dataclass
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101) and its learning rate.

    Args:
        lr: Peak learning rate.
        betas: Decay of the running means of the gradient and of its square.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of matrices, times the learning rate.
        decay_embeddings: Decay the token embedding too (and with it a tied output weight).
        warmup_steps: Optimizer steps of linear warm-up to ``lr``.
        schedule: cosine falls to the minimum over the whole run; wsd (warm-up, stable, decay) stays at
            ``lr`` until the last ``decay_fraction`` of the steps; constant stays.
        min_lr_ratio: Learning rate at the end of the schedule, as a share of ``lr``.
        decay_fraction: Share of all steps that wsd spends falling.
        grad_clip: Largest norm of the whole gradient; null never clips.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    warmup_steps: int = 100
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    min_lr_ratio: float = 0.1
    decay_fraction: float = 0.2
    grad_clip: float | None = 1.0

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise UserError(f"optim.lr is {self.lr}: it must be above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas is {self.betas}: give two numbers in [0, 1)")
        for name in ("eps", "weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"optim.{name} is {getattr(self, name)}: it must be 0 or more")
        if self.schedule not in ("cosine", "wsd", "constant"):
            raise UserError(f"optim.schedule is {self.schedule!r}: choose cosine, wsd or constant")
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"optim.min_lr_ratio is {self.min_lr_ratio}: it must be in [0, 1]")
        if not 0 < self.decay_fraction <= 1:
            raise UserError(f"optim.decay_fraction is {self.decay_fraction}: it must be in (0, 1]")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise UserError(f"optim.grad_clip is {self.grad_clip}: it must be above 0, or null")


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_embeddings: bool = False
) -> list[dict[str, Any]]:
    """The trainable parameters of ``model``, those with and those without weight decay.

    Matrices decay; norms and biases (anything with fewer than two axes) do not, nor do the attention's gates
    (parameters named ``gate…``), nor embeddings unless asked.  A tied output weight is the embedding, and
    counted once.

    Returns:
        One or two AdamW groups (an empty one is left out), in the order of ``model.parameters()``.

    Raises:
        ValueError: Nothing in ``model`` is trainable.
    """
    embeddings = {
        id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        axes = len(getattr(parameter, "ds_shape", parameter.shape))
        is_gate = name.rpartition(".")[2].startswith("gate")  # not the weight of a layer called gate
        decays = axes >= 2 and not is_gate and (decay_embeddings or id(parameter) not in embeddings)
        (decayed if decays else kept).append(parameter)
    if not decayed and not kept:
        raise ValueError("the model has no trainable parameter: unfreeze some before building the optimizer")
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig, *, offload: bool = False) -> torch.optim.Optimizer:
    """AdamW over :func:`parameter_groups`.

    Args:
        model: Already on its device, or partitioned by ZeRO-3.
        config: Peak learning rate, betas, eps, weight decay.
        offload: Use DeepSpeed's CPU Adam, for optimizer states that ZeRO keeps in the host's memory.

    Raises:
        UserError: ``offload`` without DeepSpeed installed.
    """
    groups = parameter_groups(model, config.weight_decay, decay_embeddings=config.decay_embeddings)
    if not offload:
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError as error:
        raise UserError(
            "optimizer offload needs DeepSpeed, which is not installed: pip install 'dualroute[deepspeed]'"
        ) from error
    return DeepSpeedCPUAdam(groups, lr=config.lr, betas=config.betas, eps=config.eps, adamw_mode=True)


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of the optimizer step that follows ``step`` finished ones.

    Linear warm-up reaches ``lr`` at its last step.  ``min_lr_ratio`` is reached when all ``total_steps``
    are finished, so that the last step still moves even at a ratio of 0.  wsd falls by 1 − √progress
    (Hägele et al. 2024, https://arxiv.org/abs/2405.18392).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    begin = config.warmup_steps
    if config.schedule == "wsd":
        begin = max(begin, total_steps - max(1, round(config.decay_fraction * total_steps)))
    progress = min(max((step - begin) / max(total_steps - begin, 1), 0.0), 1.0)
    shape = 1 - math.sqrt(progress) if config.schedule == "wsd" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)


@dataclass
class SpikeGuardConfig:
    """When the step of a bad batch is left out.

    Args:
        enabled: Watch the loss at all; without it, only what is not a finite number is skipped.
        window: Recent good steps that define what is usual; no spike is seen before it is full.
        threshold: Robust standard deviations above the running median that make a spike.
        patience: Skipped steps in a row after which the run stops.
        max_rollbacks: How often a run may then go back to a checkpoint and leave out the data of those
            steps; past that, or at 0, it stops.
    """

    enabled: bool = True
    window: int = 128
    threshold: float = 6.0
    patience: int = 20
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        if self.window < 2:
            raise UserError(f"spike_guard.window is {self.window}: it must be at least 2")
        if not self.threshold > 0:
            raise UserError(f"spike_guard.threshold is {self.threshold}: it must be above 0")
        if self.patience < 1:
            raise UserError(f"spike_guard.patience is {self.patience}: it must be at least 1")
        if self.max_rollbacks < 0:
            raise UserError(f"spike_guard.max_rollbacks is {self.max_rollbacks}: it must be 0 or more")


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
