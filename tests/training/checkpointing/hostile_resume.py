"""``dualroute pretrain`` resumed from states that hold code, several times in one process.

    python -m tests.training.checkpointing.hostile_resume DATA FOLDER

A training of two steps at each layout is resumed once for each file of its state (at another stage too, and
once for each file of the index that is made for that), with that file replaced by one whose unpickling makes
``FOLDER/run-by-…``, and with the metadata mended, as somebody would who means it.  Prints ``LAYOUT FILE:
status N, last line of stderr``.
"""

import contextlib
import gc
import io
import os
import shutil
import sys
from pathlib import Path

import torch

from dualroute.cli import main
from dualroute.model.checkpoint.format import find_checkpoint
from tests.sealed import redescribe
from tests.training.checkpointing.state.elastic_runs import SMALL, ZERO

LAYOUTS = {"plain": [], "stage0": ZERO[0], "stage2": ZERO[2], "stage3": ZERO[3]}


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def train(data, output, steps, layout):
    arguments = [*SMALL, "--data.path", str(data), "--output", str(output), "--train.max_steps", str(steps)]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(["pretrain", *arguments, "--optim.warmup_steps", "1", *LAYOUTS[layout]])
    gc.collect()
    return status, said.getvalue().strip().splitlines()


def states(folder):
    """The files of one state that unpickling reads."""
    return [folder] if folder.is_file() else sorted(folder.rglob("*.pt"))


def attack(data, run, layout, label, state):
    checkpoint = find_checkpoint(run)
    kept = shutil.copytree(run, run.with_name(f"{label}-kept"), symlinks=True)
    for path in states(state):
        marker = run.parent / f"run-by-{label}-{path.name}"
        torch.save({"state_dict": Payload(marker)}, path)
        if path.is_relative_to(checkpoint.folder):
            redescribe(checkpoint.folder, str(path.relative_to(checkpoint.folder)))
        status, lines = train(data, run, 3, layout)
        print(f"{label} {path.name}: status {status}, {lines[-1] if lines else ''}", flush=True)
        assert (find_checkpoint(run).step == 2) == (status == 2)
        shutil.rmtree(run)
        shutil.copytree(kept, run, symlinks=True)


def attack_all(data, folder):
    for layout in LAYOUTS:
        run = folder / layout
        assert train(data, run, 2, layout)[0] == 0
        attack(data, run, layout, layout, find_checkpoint(run).state)
    for layout, other in (("stage3", "stage2"), ("stage2", "stage3")):
        run = shutil.copytree(folder / layout, folder / f"{layout}-to-{other}", symlinks=True)
        # the first start converts, and is cut off before it publishes, which would remove what it has made
        checkpoint = find_checkpoint(run)
        with stopped_before_the_first_step():
            train(data, run, 3, other)
        converted = run / "checkpoints" / f"resharded-{checkpoint.folder.name}" / "state.ckpt"
        attack(data, run, other, run.name, converted)
        attack(data, run, other, f"{run.name}-itself", checkpoint.state)
    # and the same states without the payload are resumed
    for layout in LAYOUTS:
        assert train(data, folder / layout, 3, layout)[0] == 0
    print("whole states are resumed")


@contextlib.contextmanager
def stopped_before_the_first_step():
    from dualroute.errors import UserError
    from dualroute.training.step.module import Pretrain

    def refuse(self, *args):
        raise UserError("cut off")

    original, Pretrain.training_step = Pretrain.training_step, refuse
    try:
        yield
    finally:
        Pretrain.training_step = original


if __name__ == "__main__":
    torch.set_num_threads(1)
    attack_all(Path(sys.argv[1]), Path(sys.argv[2]))
