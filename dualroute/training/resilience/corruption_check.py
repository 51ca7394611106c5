"""Does this machine compute the same twice?  A micro-batch is run twice now and then and compared in bits.

- In: the first micro-batch of every ``watchdog.sdc_check_every_steps``-th step, before the step itself.
- Here: loss and gradient are computed twice from the same weights and the same random state; their bits are
  summed up as integers (:func:`bits`) and compared (:class:`CorruptionCheck`).
- Next: nothing, when they agree; else all ranks learn which rank it was, and the run stops.

Nothing of it reaches the optimizer.  ``torch.autograd.grad`` hands gradients back and
does not accumulate them, so no hook of DDP or DeepSpeed runs and no ``.grad`` changes.  Under ZeRO-3, where
a rank holds pieces of the weights only, the loss alone is compared.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dualroute.errors import UserError
from dualroute.training.step.module import Pretrain

log = logging.getLogger(__name__)

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SilentCorruption(UserError):
    """A rank computed two different results from the same numbers."""

    exit_status = 76  # a machine to be taken out, not a job to be tried again on it


class CorruptionCheck(Callback):
    """Compares two runs of a micro-batch; put it before callbacks that watch the forward pass.

    Where two runs differ, a third decides: if it agrees with one of them, the other was corrupted.  If all
    three differ, the arithmetic is not repeatable here (atomic additions of a GPU kernel, say) and the check
    says so and ends.

    Args:
        every_steps: Optimizer steps between two checks; 0 never.
        action: stop the run, or only warn.
    """

    def __init__(self, every_steps: int, action: Literal["stop", "warn"] = "stop") -> None:
        self.every_steps = every_steps
        self.action = action

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Pretrain)
        step = trainer.global_step + 1
        if not self.every_steps or step % self.every_steps or not pl_module.at_first_micro_batch:
            return
        first, second = (digest(trainer, pl_module, batch) for _ in range(2))
        differing = _ranks(trainer, first != second)
        if not differing:
            return
        # on all ranks: a forward pass may need all of them
        third = digest(trainer, pl_module, batch)
        unrepeatable = _ranks(trainer, first != second and third not in (first, second))
        bad = [rank for rank in differing if rank not in unrepeatable]
        if unrepeatable:
            rank_zero_warn(
                f"watchdog.sdc_check_every_steps: three runs of a micro-batch gave three results on rank(s) "
                f"{unrepeatable}: arithmetic is not repeatable here, so the check ends"
            )
            self.every_steps = 0
        if bad:
            self._tell(step, bad, trainer.global_rank in bad)

    def _tell(self, step: int, ranks: list[int], here: bool) -> None:
        host = f" on host {socket.gethostname()}" if here else ""
        message = (
            f"silent data corruption before step {step} on rank(s) {', '.join(map(str, ranks))}: one "
            f"micro-batch gave two results{host}; take that host out and "
            f"resume from a checkpoint that you trust"
        )
        if self.action == "stop":
            raise SilentCorruption(message)
        if here or 0 in ranks:
            log.warning("%s", message)


def _ranks(trainer: Trainer, flag: bool) -> list[int]:
    """Ranks on which ``flag`` is set; known to all of them."""
    flags = torch.zeros(trainer.world_size, device=trainer.strategy.root_device)
    flags[trainer.global_rank] = float(flag)
    found: list[int] = trainer.strategy.reduce(flags, reduce_op="sum").nonzero().flatten().tolist()
    return found


def digest(trainer: Trainer, pl_module: Pretrain, batch: Any) -> tuple[int, ...]:
    """Bits of loss and gradient of one micro-batch; changes neither gradients nor the random state."""
    parameters = [p for p in pl_module.model.parameters() if p.requires_grad]
    partitioned = any(hasattr(p, "ds_id") for p in parameters)
    on_cuda = [pl_module.device] if pl_module.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=on_cuda),
        torch.set_grad_enabled(not partitioned),
        trainer.precision_plugin.train_step_context(),
        _deterministic(),
    ):
        loss = pl_module.micro_batch_loss(batch)
        gradients: tuple[Tensor | None, ...] = ()
        if not partitioned:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    sums = [bits(tensor) for tensor in (loss, *gradients) if tensor is not None]
    return tuple(torch.stack(sums).tolist())


def bits(tensor: Tensor) -> Tensor:
    """Sum (0-dim int64, wrapping) of a tensor's bit patterns; any one flipped bit changes it."""
    tensor = tensor.detach().contiguous()
    return tensor.view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
