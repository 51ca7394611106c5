"""Two trainings in one folder: the second is refused, until the first is gone."""

import errno
import io
import os
import time
from pathlib import Path

import pytest

from dualroute.errors import UserError
from dualroute.training.parallel.environment import World
from dualroute.training.resilience import run_lock
from dualroute.training.resilience.run_lock import locked
from tests import warm
from tests.conftest import ROOT
from tests.training.resilience.ranks import finish, start
from tests.training.step.test_module import command, environment

HOLDER = str(Path(__file__).with_name("processes") / "lock_holder.py")


@pytest.fixture
def holder(tmp_path, tmp_path_factory):
    """Another process that trains in tmp_path; it has a child that outlives it."""
    sign = tmp_path_factory.mktemp("holder") / "sign"
    process = warm.Started(HOLDER, [tmp_path, sign], cwd=ROOT, env=environment())
    while not sign.exists():
        assert process.poll() is None
        time.sleep(0.02)
    yield process
    process.kill()
    sign.unlink()  # the child ends


@pytest.mark.slow
def test_a_second_training_is_refused_until_the_first_is_killed(holder, tmp_path):
    with (
        pytest.raises(UserError, match=rf"process {holder.pid} on .*another --output"),
        locked(tmp_path, World()),
    ):
        pass
    holder.kill()
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


def a_file(output):
    output.write_text("")


def below_a_file(output):
    output.parent.rmdir()
    output.parent.write_text("")


def a_dangling_link(output):
    output.symlink_to("nowhere")


def a_folder_for_a_lock(output):
    (output / run_lock.LOCK).mkdir(parents=True)


def a_pipe_for_a_lock(output):
    output.mkdir()
    os.mkfifo(output / run_lock.LOCK)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (a_file, "there is a file of that name"),
        (below_a_file, "Not a directory"),
        (a_dangling_link, "it is a link to nowhere, which is not there"),
        (a_folder_for_a_lock, ".lock in it is no file"),
        (a_pipe_for_a_lock, ".lock in it is no file"),
    ],
)
def test_an_output_that_is_no_folder_is_named(tmp_path, how, words):
    output = tmp_path / "parent" / "run"
    output.parent.mkdir()
    how(output)
    line = f"{output} cannot be written .*{words}.*--output"
    with pytest.raises(UserError, match=line), locked(output, World()):
        pass


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("when", ["mkdir", "open", "sign"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch, error, when):
    """Read-only, not ours, full, over quota; the file may be there and its content fail to be written."""

    class Full(io.StringIO):
        def flush(self):
            raise OSError(error, os.strerror(error))

        def fileno(self):
            return 0

    def refuse(*_, **__):
        raise OSError(error, os.strerror(error))

    if when == "mkdir":
        monkeypatch.setattr(run_lock.Path, "mkdir", refuse)
    else:
        monkeypatch.setattr("builtins.open", refuse if when == "open" else lambda *_, **__: Full())
        monkeypatch.setattr(run_lock, "lock_of_process", lambda _: True)
    with pytest.raises(UserError) as refusal, locked(tmp_path, World()):
        pass
    monkeypatch.undo()
    assert os.strerror(error) in str(refusal.value)
    assert ("make room" in str(refusal.value)) == (error in (errno.ENOSPC, errno.EDQUOT))


@pytest.mark.slow
def test_a_link_to_a_folder_is_that_folder(holder, tmp_path):
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    with pytest.raises(UserError, match="is being trained in"), locked(link, World()):
        pass


@pytest.mark.slow
def test_the_command_says_who_is_there(holder, tiny_dataset, tmp_path):
    result = warm.run(command(tiny_dataset, tmp_path, 8)[3:], cwd=ROOT, env=environment())
    assert result.returncode == 2
    assert f"is being trained in by process {holder.pid} on" in result.stderr
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_ranks_of_a_second_start_end_together_and_leave_no_heartbeat(holder, tiny_dataset, tmp_path):
    """Rank 1 holds no lock: it learns from rank 0 that the folder is another run's."""
    (tmp_path / "heartbeats").mkdir()
    beat = tmp_path / "heartbeats" / "rank-00001.json"
    beat.write_text("of the run that is there")
    results = finish(start(tiny_dataset, tmp_path, 8, "--parallel.strategy", "ddp"), timeout=120)
    assert [status for status, _ in results] == [2, 2]
    assert all(f"is being trained in by process {holder.pid} on" in error for _, error in results)
    assert beat.read_text() == "of the run that is there"
    assert not (tmp_path / "checkpoints").exists()
