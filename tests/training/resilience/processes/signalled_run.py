"""``dualroute pretrain`` run several times in one process, which signals itself, as test_preemption.py asks.

SIGNALS is a list of PLACE:STEP:RANK, separated by commas; each run gets one: inside that place, when so many
steps are done, on that rank (``all``: on each).  What the runs print stands between the lines ``run PLACE``
and ``status N``.
"""

import os
import signal
import sys

import torch

from dualroute.cli import main
from dualroute.training.checkpointing.publishing import publisher
from dualroute.training.parallel.environment import detect_world, strip_local_rank
from dualroute.training.resilience import stop_signal
from dualroute.training.step.module import Pretrain

PLACES = {
    "nowhere": (Pretrain, "on_train_end"),
    "micro-batch": (Pretrain, "training_step"),
    "optimizer": (Pretrain, "on_before_optimizer_step"),
    "validation": (Pretrain, "validation_step"),
    "save": (publisher, "gather_weights"),
    "end": (Pretrain, "on_train_end"),
}


class Signalling:
    """Sends SIGUSR1 to this process before the function of a place is called at a step."""

    def __init__(self, place, step):
        self.owner, self.name = PLACES[place]
        self.step = step

    def __enter__(self):
        self.original = original = getattr(self.owner, self.name)

        def signalling(*args, **kwargs):
            if trainer_of["run"].global_step == self.step and not stop_signal.received():
                os.kill(os.getpid(), signal.SIGUSR1)
            return original(*args, **kwargs)

        setattr(self.owner, self.name, signalling)

    def __exit__(self, *_):
        setattr(self.owner, self.name, self.original)


trainer_of = {}
setup = Pretrain.setup


def remember(self, stage):
    trainer_of["run"] = self.trainer
    setup(self, stage)


Pretrain.setup = remember

if __name__ == "__main__":
    stop_signal.install()
    rank = detect_world().rank
    for case in os.environ["SIGNALS"].split(","):
        place, step, where = case.split(":")
        stop_signal._received = 0
        if rank == 0:
            print(f"run {place}", flush=True)
        with Signalling(place, int(step) if where in ("all", str(rank)) else -1):
            status = main(["pretrain", *strip_local_rank(sys.argv[1:])])
        if rank == 0:
            print(f"status {status}", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
