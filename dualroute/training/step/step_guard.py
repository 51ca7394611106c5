"""Looking at a whole optimizer step before it is taken, and leaving it out when it is bad.

- In: the gradients of one accumulation cycle, reduced over the ranks but not yet clipped, and the loss that
  the LightningModule recorded for each micro-batch.
- Here: the mean loss and the global gradient norm are made equal on every rank; the module says whether to
  skip; a skipped step leaves parameters, optimizer state and master weights untouched and clears gradients.
- Next: Lightning counts the step either way, so data and learning-rate schedule go on.

Nothing in DeepSpeed is patched to skip a step.  Its optimizers already leave out a step
whose gradients overflowed (that is how fp16 works), so :func:`discard_step` makes the gradients non-finite
and lets each of them take its own, well-trodden path.  A plain torch optimizer passes over a parameter
without a gradient, so there (one process, DDP, ZeRO stage 0) the gradients are simply taken away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from dualroute import compat


class StepOutcome(NamedTuple):
    """One accumulation cycle: mean loss over micro-batches and ranks, gradient norm unclipped, verdict."""

    loss: float
    grad_norm: float
    skipped: bool


class StepGuard:
    """Decides, once per optimizer step and alike on all ranks, whether the step is taken.

    Use it from a LightningModule with automatic optimization::

        def training_step(self, batch, batch_idx):
            loss = ...
            self.step_guard.record(loss)          # the very tensor that is returned
            return loss

        def on_before_optimizer_step(self, optimizer):
            outcome = self.step_guard.check(self.trainer, self.should_skip_step)
            if outcome is not None: ...           # the end of an accumulation cycle: log, advance the data

    Under DeepSpeed Lightning calls ``on_before_optimizer_step`` for every micro-batch, otherwise only at the
    end of a cycle; :meth:`check` returns None in between, so a module need not care.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []

    def record(self, loss: Tensor) -> None:
        """Keeps the loss (0-dim) of one micro-batch; no synchronisation with the device."""
        self._losses.append(loss.detach().float())

    def check(self, trainer: Trainer, should_skip: Callable[[float, float], bool]) -> StepOutcome | None:
        """At the end of an accumulation cycle: ask, and discard the step if so told; elsewhere None.

        ``should_skip(loss, grad_norm)`` gets the same two numbers on every rank and must be a function of
        them (and of what it was given before).  A step whose loss or gradient norm is not finite is always
        skipped, whatever it answers: ZeRO could not take it.

        Raises RuntimeError if no loss was recorded since the last step.
        """
        if not at_step_boundary(trainer):
            return None
        if not self._losses:
            raise RuntimeError("StepGuard.record() was not called in training_step")
        loss = torch.stack(self._losses).mean()
        self._losses.clear()
        # One small reduction; it also makes the norm bit-equal where every rank worked it out for itself.
        numbers = torch.stack([loss.to(trainer.strategy.root_device), gradient_norm(trainer)])
        mean_loss, grad_norm = trainer.strategy.reduce(numbers, reduce_op="mean").tolist()
        wanted = should_skip(mean_loss, grad_norm)
        skipped = wanted or not (math.isfinite(mean_loss) and math.isfinite(grad_norm))
        if skipped:
            discard_step(trainer)
        return StepOutcome(mean_loss, grad_norm, skipped)


def at_step_boundary(trainer: Trainer) -> bool:
    """Inside ``on_before_optimizer_step``: is this the last micro-batch of its accumulation cycle?"""
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return bool(trainer.strategy.deepspeed_engine.is_gradient_accumulation_boundary())
    return True


@torch.no_grad()
def gradient_norm(trainer: Trainer) -> Tensor:
    """The 2-norm of the whole gradient, before clipping, as clip_grad_norm_ of a one-process run returns it.

    0-dim float32 on the root device; ``inf`` when any gradient is not finite.  A collective call under ZeRO:
    all ranks, at a step boundary only.
    """
    device = trainer.strategy.root_device
    optimizer = _deepspeed_optimizer(trainer)
    kind = _kind(optimizer)
    if kind == "zero12":
        norm = optimizer.scaled_global_norm() / optimizer.loss_scale
    elif kind == "zero3":
        norm = compat.zero3_gradient_norm(optimizer) / optimizer.loss_scale
    elif kind == "bf16":
        norm = _norm(optimizer.get_grads_for_norm(for_clipping=True), device)
    else:
        parameters = _parameters(trainer, optimizer)
        norm = _norm((p.grad for p in parameters if p.grad is not None), device)
        norm = norm / getattr(optimizer, "loss_scale", 1.0)
    norm = norm.to(device=device, dtype=torch.float32)
    # DeepSpeed marks a norm that is not finite by -1.
    return torch.where(torch.isfinite(norm) & (norm >= 0), norm, torch.full_like(norm, math.inf))


@torch.no_grad()
def discard_step(trainer: Trainer) -> None:
    """Makes the optimizer step that is about to run a step that does nothing but clear the gradients.

    Call it at a step boundary, on all ranks.  DeepSpeed counts the step as skipped (``engine.skipped_steps``)
    at ZeRO stages 1-3; with fp16 its dynamic loss scale also falls, as after any overflow.
    """
    optimizer = _deepspeed_optimizer(trainer)
    kind = _kind(optimizer)
    if kind in ("zero12", "zero3"):
        # New tensors, not the old ones filled: under ZeRO-3 those are windows of a buffer whose padding is
        # never written again, so a NaN would stay there.  An expanded scalar takes no memory.
        nan = torch.full((), math.nan, device=trainer.strategy.root_device)
        for group, gradients in (optimizer.averaged_gradients or {}).items():
            optimizer.averaged_gradients[group] = [nan.expand_as(g) for g in gradients or ()]
        offloaded = getattr(optimizer, "norm_for_param_grads", {})  # there the norms are worked out already
        offloaded.update(dict.fromkeys(offloaded, nan))
    elif kind == "bf16":
        _fill_with_nan(optimizer.get_grads_for_norm(for_clipping=True))
    elif kind == "half":
        _fill_with_nan(p.grad for p in _parameters(trainer, optimizer) if p.grad is not None)
    else:
        for parameter in _parameters(trainer, optimizer):
            parameter.grad = None


def _deepspeed_optimizer(trainer: Trainer) -> Any:
    """DeepSpeed's optimizer around ours, or None without DeepSpeed."""
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return trainer.strategy.deepspeed_engine.optimizer
    return None


def _kind(optimizer: Any) -> str:
    """Which of DeepSpeed's wrappers this is, named by where it keeps the reduced gradients.

    zero12, zero3: partitions in ``averaged_gradients``; bf16: fp32 copies of all (stage 1 with fp32
    accumulation); half: ``.grad`` of 16-bit parameters (stage 0); plain: ``.grad``, with a torch optimizer.
    """
    if optimizer is None or isinstance(optimizer, torch.optim.Optimizer):
        return "plain"
    if hasattr(optimizer, "scaled_global_norm"):
        return "zero12"
    if hasattr(optimizer, "_get_norm_groups"):
        return "zero3"
    if hasattr(optimizer, "fp32_groups_gradients_flat"):
        return "bf16"
    return "half"


def _parameters(trainer: Trainer, optimizer: Any) -> list[Tensor]:
    """The parameters whose ``.grad`` the optimizer will read."""
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        return [p for group in optimizer.fp16_groups for p in group]
    return [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]


def _norm(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=device)


def _fill_with_nan(gradients: Iterable[Tensor]) -> None:
    for gradient in gradients:
        gradient.fill_(math.nan)
