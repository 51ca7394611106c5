"""One rank of a real pretraining in which something goes wrong; the tests beside it start it as a
process.

``faulty_rank.py FAULT RANK STEP pretrain --option …``: rank RANK does FAULT in optimizer step STEP.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from typing import Any

import torch

from dualroute.cli import main
from dualroute.training.step.module import Pretrain


def sleep_in_forward(module: Pretrain) -> None:
    time.sleep(10_000)


def kill(module: Pretrain) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(module: Pretrain) -> None:
    raise ArithmeticError("an error of this rank alone")


def hold_the_interpreter(module: Pretrain) -> None:
    """C code that never gives Python's lock back."""
    import ctypes

    ctypes.PyDLL(None).sleep(10_000)


def compute_wrongly_once(step: int) -> None:
    """The second run of the corruption check differs in the last bits."""
    original, calls = Pretrain.micro_batch_loss, [0]

    def micro_batch_loss(self: Pretrain, batch: Any) -> Any:
        loss = original(self, batch)
        if self.trainer.global_step + 1 == step:
            calls[0] += 1
            if calls[0] == 2:
                loss = loss * (1 + 2**-20)
        return loss

    Pretrain.micro_batch_loss = micro_batch_loss  # type: ignore[method-assign]


def spoil_samples(first: int, last: int) -> None:
    """The loss is not a number in a step that begins at a sample from ``first`` to ``last``."""
    original = Pretrain.training_step

    def training_step(self: Pretrain, batch: Any, batch_idx: int) -> Any:
        loss = original(self, batch, batch_idx)
        if first <= self.trainer.datamodule.samples_consumed <= last:  # type: ignore[attr-defined]
            self.step_guard._losses[-1] *= math.nan
            return loss * math.nan
        return loss

    Pretrain.training_step = training_step  # type: ignore[method-assign]


FAULTS = {
    "sleep": sleep_in_forward, "kill": kill, "fail": fail, "hold": hold_the_interpreter,
    "none": lambda module: None,
}  # fmt: skip


def at_step(step: int, action: Any) -> None:
    original = Pretrain.training_step

    def training_step(self: Pretrain, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step + 1 == step:
            action(self)
        return original(self, batch, batch_idx)

    Pretrain.training_step = training_step  # type: ignore[method-assign]


def skip_a_reduction(step: int) -> None:
    """The validation after ``step`` leaves out the sum over ranks; the others wait in it."""
    original = Pretrain.on_validation_epoch_end

    def on_validation_epoch_end(self: Pretrain) -> None:
        if self.trainer.global_step == step:
            self.validation_metrics = {"loss": 1.0, "bits_per_byte": 1.0}
        else:
            original(self)

    Pretrain.on_validation_epoch_end = on_validation_epoch_end  # type: ignore[method-assign]


if __name__ == "__main__":
    fault, rank, step, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    if int(rank) == int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))):
        if fault == "skip":
            skip_a_reduction(int(step))
        elif fault in ("spoil", "spoil_all"):
            spoil_samples(int(step), int(step) + 31 if fault == "spoil" else sys.maxsize)
        elif fault == "flip":
            compute_wrongly_once(int(step))
        else:
            at_step(int(step), FAULTS[fault])
    sys.argv[1:] = arguments
    sys.exit(main())
