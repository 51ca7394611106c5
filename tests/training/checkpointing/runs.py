"""Trainings inside the test's own process, which take half a second, and what they leave in a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from dualroute.cli import main
from dualroute.training.step.module import Pretrain
from tests.training.step.test_module import SMALL

KEPT = ("--checkpoint.keep_last", "9")


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the training catches it."""


def pretrain(dataset: Path, output: Path | str, steps: int, *more: str) -> int:
    """``dualroute pretrain``, two micro-batches a step; a checkpoint every four steps.  Its exit status."""
    quiet = ("--monitor.sample_every_steps", "0", "--train.val_every_steps", "50", "--train.micro_batch", "4")
    run = ("--data.path", str(dataset), "--output", str(output), "--train.max_steps", str(steps))
    return main(["pretrain", *SMALL, *quiet, *run, *more])


@contextlib.contextmanager
def killed_in(step: int) -> Iterator[None]:
    """The training that is started here ends in ``step``, of which nothing is saved."""
    finish = Pretrain.finish_step

    def finish_step(self: Pretrain) -> None:
        if self.trainer.global_step >= step:
            raise Killed
        finish(self)

    with mock.patch.object(Pretrain, "finish_step", finish_step), contextlib.suppress(Killed):
        yield


def snapshot(run: Path) -> dict[str, Any]:
    """{path: size, time of the last change, content of a link} of all that a refused start must not change.

    Whoever holds the lock signs it, and ranks write heartbeats while they load.
    """
    found = {}
    for folder, folders, files in os.walk(run):
        for name in [*folders, *files]:
            path = Path(folder, name)
            place = path.relative_to(run)
            if place.parts[0] in (".lock", "heartbeats"):
                continue
            status = path.lstat()
            link = os.readlink(path) if path.is_symlink() else None
            found[str(place)] = (status.st_mode, status.st_size, status.st_mtime_ns, link)
    return found


def steps_in(run: Path) -> list[str]:
    """Names in ``checkpoints``, sorted."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def begun_at(capsys: Any) -> list[str]:
    """Names of the checkpoints that runs have resumed from since the last look."""
    lines = capsys.readouterr().out.splitlines()
    return [line.split()[2].rpartition("/")[2] for line in lines if line.startswith("resuming from")]
