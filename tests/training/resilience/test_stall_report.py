"""The line that names the culprit, from heartbeats that are made up; and the stack it is read from."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dualroute import compat
from dualroute.training.resilience import flight_record
from dualroute.training.resilience.flight_record import summary
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
from dualroute.training.resilience.stall_report import (
    describe,
    flight_of_this_rank,
    place_of,
    ranks,
    started_collectives,
    waiting_in,
    write_flight_dump,
    write_stacks,
)
from tests.training.resilience.nccl_dumps import PAIRS, SITUATIONS, dump, step


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
    assert ranks(range(0, 200, 2)).endswith("28, 30 and 84 more")


def on_nccl(rank: int, record: dict[str, object]) -> Beat:
    """The beat of a rank whose main thread stands in ``.item()``, where no collective is to be seen."""
    flight = summary([record])
    waits = flight_record.waiting_text(flight)
    return beat(rank, waits_in=waits, waits_by_record=bool(waits), flight=flight, where="step.py:9 in check")


@pytest.mark.parametrize("situation", SITUATIONS)
def test_on_nccl_the_flight_recorder_decides(situation: str) -> None:
    dumps, words = SITUATIONS[situation]
    line = describe({rank: on_nccl(rank, record) for rank, record in dumps.items()}, [], "")
    for said in words:
        assert said in line
    assert "\n" not in line


@pytest.mark.slow
def test_a_line_about_a_thousand_ranks_can_be_read() -> None:
    groups = {"0": list(range(1024))}
    behind = set(range(0, 1024, 3))
    beats = {
        rank: on_nccl(rank, dump(step("" if rank in behind else "scheduled"), groups)) for rank in range(1024)
    }
    assert len(describe(beats, [], "")) < 2500
    everywhere = {rank: beat(rank, waits_in=f"collective {rank}", where="x") for rank in range(1, 1024)}
    assert len(describe({0: beat(0, where="x"), **everywhere}, [], "")) < 2500
    apart_groups = {**groups, "1": list(range(1, 1024, 2))}
    apart = {
        rank: on_nccl(rank, dump(step("scheduled", group=f"{rank % 2}"), apart_groups))
        for rank in range(1024)
    }
    assert len(describe(apart, [], "")) < 2500


def test_a_stack_that_shows_a_collective_goes_before_the_recorder() -> None:
    flight = summary([dump(step("scheduled"), PAIRS[0])])
    waits = {rank: beat(rank, waits_in="torch.distributed.barrier", flight=flight) for rank in range(2)}
    assert "all ranks wait in torch.distributed.barrier" in describe(waits, [], "")


@pytest.mark.parametrize(
    "record",
    [{}, {"entries": [7]}, {"entries": [{"record_id": 0}]}, {"entries": [{}], "pg_status": {"None": {}}}],
    ids=str,
)
def test_a_dump_of_another_format_says_less_and_breaks_nothing(record: dict[str, object]) -> None:
    flights = {rank: summary([record]) for rank in range(2)}
    assert isinstance(
        flight_record.verdict({rank: flight for rank, flight in flights.items() if flight}), str
    )


def test_what_cannot_be_recorded_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert flight_of_this_rank() == {}
    assert started_collectives({}) == -1
    assert started_collectives(summary([dump(step("scheduled"), PAIRS[0])])) == 3
    write_flight_dump(tmp_path / "nccl_trace_rank_0")
    assert (tmp_path / "nccl_trace_rank_0").stat().st_size > 0
    monkeypatch.setattr(compat, "flight_records", lambda: 1 / 0)
    monkeypatch.setattr(compat, "flight_dump", lambda: 1 / 0)
    assert flight_of_this_rank() == {}
    write_flight_dump(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr(compat, "flight_records", lambda: time.sleep(60))
    assert flight_of_this_rank(limit=0.05) == {}  # one that hangs is left alone


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
