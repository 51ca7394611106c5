"""Stopping when somebody asks for it: save at a step boundary, requeue the job, end.

- In: the flag of ``training/resilience/stop_signal.py``, which each rank sees at a moment of its own: Slurm's
  signals, ``kill``, Ctrl-C, a terminal that is gone, or a launcher that is
  (``training/resilience/launcher.py``).
- Here: after each optimizer step, and after each validation, the ranks take the maximum of their flags, so
  that all of them stop after the same step; the checkpoint goes through the run's publisher.  Then rank zero
  asks Slurm to queue the job again (``training/resilience/requeue.py``), or prints the command that
  continues.
- Next: the process ends with `PREEMPTED`; the same command resumes.

The exit status is not 0 although all went well.  Where Slurm did requeue the job it does
not look at the status.  Where it did not (``--no-requeue``, no Slurm), a status of 0 would tell it that the
job is COMPLETED, and the next stage of an ``afterok`` chain would start with half a model.
"""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dualroute import compat
from dualroute.errors import RUN_AGAIN
from dualroute.training.checkpointing.publishing.publisher import CheckpointPublisher
from dualroute.training.resilience import stop_signal
from dualroute.training.resilience.launcher import command_line
from dualroute.training.resilience.requeue import NOT_IN_SLURM, requeue_job

log = logging.getLogger(__name__)

PREEMPTED = RUN_AGAIN
"""Exit status of a run that saved and stopped before its last step."""


class Preemption(Callback):
    """Ends the training at the next step boundary after a signal, with a checkpoint.

    A validation that has begun is finished, and one that is due is done, before the checkpoint, as in a run
    that nobody stopped: the resumed run's curves are the unbroken run's.  After the last step there is
    nothing to stop.  Before the first one Ctrl-C and SIGHUP end the start where it is.  Stands last in the
    Trainer's list, behind the publisher.

    Args:
        publisher: Writes the checkpoint.

    Attributes:
        signal: The signal that ended the run, 0 while none did; equal on all ranks.
    """

    def __init__(self, publisher: CheckpointPublisher) -> None:
        self.publisher = publisher
        self.signal = 0
        self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        stop_signal.check_start()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stop_signal.check_start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stop_signal.training_begins()
        self._last_step = trainer.global_step
        # a resumed run has its checkpoint already, a fresh one nothing to save
        trainer.should_stop = self._asked(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._last_step:  # a micro-batch inside a step
            return
        self._last_step = step
        if self._asked(trainer) and not self.publisher.validation_follows(trainer):
            self.publisher.publish(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        # Only now: should_stop in on_train_batch_end would make Lightning validate first.  The module
        # answers it with -1, which leaves the loop
        trainer.should_stop = trainer.should_stop or self.signal != 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or not self._asked(trainer):
            return
        self.publisher.publish(trainer, pl_module)
        trainer.should_stop = True

    def _asked(self, trainer: Trainer) -> bool:
        """Whether any rank was signalled before the last step was done; the same answer on every rank."""
        if self.signal == 0 and trainer.global_step < trainer.max_steps:
            mine = torch.tensor(stop_signal.received(), device=trainer.strategy.root_device)
            self.signal = int(trainer.strategy.reduce(mine, reduce_op="max"))
        return self.signal != 0


def leave_signals_to_us(trainer: Trainer) -> None:
    """Keep Lightning from wrapping our handler of SIGTERM in its own, which runs a collective at once.

    Ranks are signalled at different moments, so that broadcast meets another collective, and the run hangs.
    """
    stop_signal.check_start()
    if stop_signal.installed():
        compat.take_no_signals(trainer)


def stop_for_requeue(trainer: Trainer, preemption: Preemption) -> int:
    """The last act of a run that was asked to stop, on every rank: requeue its job.  Returns `PREEMPTED`.

    Ctrl-C and SIGHUP come from a person, so they requeue nothing.
    """
    if trainer.is_global_zero:
        refused = NOT_IN_SLURM
        if preemption.signal in stop_signal.SCHEDULER_SIGNALS:
            refused = requeue_job()
        name = signal.Signals(preemption.signal).name
        why = stop_signal.reason() if preemption.signal == stop_signal.received() else name
        stopped = f"{why}: stopped after step {trainer.global_step} of {trainer.max_steps}"
        log.info("%s", f"{stopped}; {_how_to_go_on(refused)}")
    # a rank that ends early would make srun --kill-on-bad-exit end rank zero before it has asked Slurm
    trainer.strategy.barrier("job requeued")
    return PREEMPTED


def _how_to_go_on(refused: str) -> str:
    if not refused:
        return "Slurm runs the job again"
    because = "" if refused == NOT_IN_SLURM else f" ({refused})"
    if "SLURM_JOB_ID" in os.environ:
        return f"the same command continues{because}: submit the same job again"
    return f"the same command continues{because}: {command_line()}"
