"""Two trainings in one folder: the second is refused, until the first is gone."""

import os
import signal
import subprocess
import sys

import pytest

from dualroute.errors import UserError
from dualroute.training.parallel.environment import World
from dualroute.training.resilience import run_lock
from dualroute.training.resilience.run_lock import locked
from tests.conftest import ROOT
from tests.training.step.test_module import command, environment

HOLDER = """
import os, sys
from pathlib import Path
from dualroute.training.resilience.run_lock import locked
from dualroute.training.parallel.environment import World
with locked(Path(sys.argv[1]), World()):
    child = os.fork()  # as processes that read data are
    if child == 0:
        sys.stdin.read()
        os._exit(0)
    print("there", flush=True)
    os.waitpid(child, 0)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that trains in tmp_path; it has a child that outlives it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "there\n"
    yield process
    process.kill()
    process.stdin.close()  # the child ends
    process.wait()


@pytest.mark.slow
def test_a_second_training_is_refused_until_the_first_is_killed(holder, tmp_path):
    with (
        pytest.raises(UserError, match=rf"process {holder.pid} on .*another --output"),
        locked(tmp_path, World()),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path, World()):
        assert str(os.getpid()) in (tmp_path / run_lock.LOCK).read_text()


@pytest.mark.slow
def test_other_ranks_take_nothing(holder, tmp_path):
    with locked(tmp_path, World(rank=1, world_size=2)):
        pass


def test_without_locks_it_trains(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with locked(tmp_path, World()):
        pass


@pytest.mark.slow
def test_the_command_says_who_is_there(holder, tiny_dataset, tmp_path):
    result = subprocess.run(
        command(tiny_dataset, tmp_path, 8),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 2
    assert f"is being trained in by process {holder.pid} on" in result.stderr
    assert not (tmp_path / "checkpoints").exists()
