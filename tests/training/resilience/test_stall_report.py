"""The line that names the culprit, from heartbeats that are made up; and the stack it is read from."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dualroute.training.resilience.heartbeat import (
    CUT_OFF,
    FAILED,
    Beat,
    Heart,
    Stillness,
    beat_path,
    process_is_gone,
    read_beat,
    started_at,
    this_place,
)
from dualroute.training.resilience.stall_report import describe, place_of, ranks, waiting_in, write_stacks


def beat(rank: int, **values: object) -> Beat:
    started = started_at(os.getpid())
    fields = {"host": "a", "place": this_place(), "pid": os.getpid(), "started": started, "step": 5}
    return Beat(rank, **{**fields, "phase": "forward", "answers": "alarm", **values})  # type: ignore[arg-type]


def test_who_is_waited_for_is_named_and_who_waits_is_counted() -> None:
    waiting = {r: beat(r, waits_in="torch.distributed.all_reduce", phase="backward") for r in (0, 1, 3)}
    line = describe({**waiting, 2: beat(2, seconds=612.0, where="m.py:3 in f")}, [], "")
    assert line == (
        f"rank 2 (host a, pid {os.getpid()}) is slow or stuck in forward of step 5 for 612 s, at m.py:3 in f"
        "; ranks 0-1, 3 wait in torch.distributed.all_reduce (in backward of step 5)"
    )


def test_the_dead_the_mute_the_failed_and_the_missing() -> None:
    waits = beat(0, waits_in="torch.distributed.barrier")
    dead = beat(1, started=1.0, answers="")  # the number belongs to another process by now
    assert "rank 1 (host a" in describe({0: waits, 1: dead}, [1], "")
    assert "is dead: its process is gone" in describe({0: waits, 1: dead}, [1], "")
    away = beat(1, place="elsewhere", answers="")
    assert "no longer writes its heartbeat" in describe({0: waits, 1: away}, [1], "")
    assert "lives but does not answer" in describe({0: waits, 1: beat(1, answers="")}, [1], "")
    assert "rank 1 never started; rank 0 waits in" in describe({0: waits, 1: None}, [1], "")
    failed = beat(1, state=FAILED, error="ValueError: x", started=1.0, answers="")
    assert "failed in forward of step 5: ValueError: x" in describe({0: waits, 1: failed}, [1], "")
    # a rank whose connection broke because another died is no culprit
    line = describe({0: beat(0, state=CUT_OFF, answers=""), 1: dead}, [0, 1], "")
    assert "rank 1 (host a" in line
    assert "rank 0 (host a" not in line


def test_ranks_that_wait_for_each_other() -> None:
    a = beat(0, waits_in="torch.distributed.all_reduce", collectives=12)
    b = beat(1, waits_in="torch.distributed.barrier", collectives=11)
    line = describe({0: a, 1: b}, [], "")
    assert (
        "all ranks wait, but not in the same collective: rank 0 waits in torch.distributed.all_reduce" in line
    )
    assert line.endswith(
        "rank 1 started the fewest: a collective was left out there, or is too many elsewhere"
    )
    same = describe({0: a, 1: beat(1, waits_in="torch.distributed.all_reduce", collectives=12)}, [], "")
    assert "the connection between them does not carry it through" in same


def test_many_ranks_are_written_shortly() -> None:
    assert ranks([3]) == "rank 3"
    assert ranks([7, 0, 1, 2, 5]) == "ranks 0-2, 5, 7"


def test_a_beat_is_read_as_it_was_written_and_half_of_one_is_none(tmp_path: Path) -> None:
    heart = Heart(tmp_path, 3)
    heart.mark("forward", 7)
    heart.mark("backward", 7)
    written = heart.beat(waits_in="x")
    assert read_beat(tmp_path, 3) == written
    assert (written.moves, written.step, written.phase, written.beats) == (2, 7, "backward", 1)
    assert not process_is_gone(written)
    path = beat_path(tmp_path, 3)
    path.write_text(path.read_text()[:40])
    assert read_beat(tmp_path, 3) is None
    assert read_beat(tmp_path, 4) is None


def test_a_process_that_ended_is_gone_even_before_its_parent_looks() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lives = beat(0, pid=child.pid, started=started_at(child.pid))
    assert not process_is_gone(lives)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, but still a zombie
    assert process_is_gone(lives)
    child.wait()
    assert process_is_gone(lives)
    assert not process_is_gone(beat(0, pid=child.pid, place="another host"))


def test_time_in_which_the_looker_was_stopped_does_not_count() -> None:
    still = Stillness(longest_look=3.0)
    assert [still.look(1, now) for now in (0.0, 1.0, 2.0)] == [0.0, 1.0, 2.0]
    assert still.look(1, 3600.0) == 5.0  # the job was suspended for an hour
    assert still.look(2, 3601.0) == 0.0


@pytest.fixture
def stuck_in_barrier() -> object:
    """A thread in a function that looks as if it were torch's barrier."""
    release, inside = threading.Event(), threading.Event()
    names: dict[str, object] = {"wait_here": lambda: (inside.set(), release.wait())}
    code = "def wait():\n    wait_here()\ndef barrier():\n    wait()\n"
    exec(compile(code, "/x/site-packages/torch/distributed/distributed_c10d.py", "exec"), names)
    thread = threading.Thread(target=names["barrier"])  # type: ignore[arg-type]
    thread.start()
    inside.wait()
    yield sys._current_frames()[thread.ident or 0]
    release.set()
    thread.join()


def test_a_collective_is_read_from_the_stack(stuck_in_barrier: object, tmp_path: Path) -> None:
    assert waiting_in(stuck_in_barrier) == "torch.distributed.barrier"  # type: ignore[arg-type]
    assert waiting_in(sys._getframe()) == ""
    assert place_of(sys._getframe()).endswith("in test_a_collective_is_read_from_the_stack")
    write_stacks(tmp_path / "stalls" / "rank.txt", "why", ValueError("first"))
    text = (tmp_path / "stalls" / "rank.txt").read_text()
    assert "why" in text.splitlines()[0]
    assert "ValueError: first" in text
    assert "distributed_c10d.py" in text
