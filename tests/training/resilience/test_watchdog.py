"""Two real ranks of a training of which one sleeps, dies, fails, or does another number of collectives."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from dualroute.training.resilience.watchdog import EXIT_STALLED
from tests.training.resilience.ranks import finish, start

pytestmark = pytest.mark.slow
DDP = ("--parallel.strategy", "ddp")


def the_line(results: list[tuple[int, str]]) -> str:
    """The one line that names the culprit: exactly one rank prints it."""
    lines = [line for _, error in results for line in error.splitlines() if "the training is stopped" in line]
    assert len(lines) == 1, results
    return lines[0]


def test_a_rank_that_sleeps_is_named_and_all_stacks_are_kept(tiny_dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    results = finish(start(tiny_dataset, run, 40, *DDP, fault=("sleep", 1, 6)))
    assert [code for code, _ in results] == [EXIT_STALLED, EXIT_STALLED]
    line = the_line(results)
    assert "rank 1 (host " in line
    assert "slow or stuck in forward of step 6 for " in line
    assert "faulty_rank.py" in line
    assert "in sleep_in_forward" in line
    assert "rank 0 waits in " in line
    assert "rank 0 (host" not in line
    assert (run / "stalls" / "report.txt").read_text().strip() in line
    assert "sleep_in_forward" in (run / "stalls" / "rank-00001.txt").read_text()
    assert "run_pretraining" in (run / "stalls" / "rank-00000.txt").read_text()


def test_a_killed_rank_is_named(tiny_dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    run = tmp_path / "run"
    (code, _), (killed, _) = results = finish(start(tiny_dataset, run, 12, fault=("kill", 1, 6)))
    assert (code, killed) == (EXIT_STALLED, -signal.SIGKILL), results
    assert "rank 1 (host " in the_line(results)
    assert "is dead: its process is gone, last seen in " in the_line(results)


def test_a_rank_that_leaves_out_a_collective(tiny_dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = (*DDP, "--train.val_every_steps", "4")
    results = finish(start(tiny_dataset, run, 40, *more, fault=("skip", 1, 4)))
    assert [code for code, _ in results] == [EXIT_STALLED, EXIT_STALLED]
    line = the_line(results)
    assert "all ranks wait, but not in the same collective" in line
    assert "rank 0 waits in torch.distributed.barrier (in validation of step 4" in line
    assert "rank 1 waits in torch.distributed.broadcast_object_list (in " in line


def test_a_rank_in_c_code_that_keeps_the_interpreter_is_named_by_the_other(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    processes = start(tiny_dataset, run, 40, *DDP, fault=("hold", 1, 6))
    (code, error), *_ = finish(processes[:1])
    still_running = processes[1].poll()
    processes[1].kill()
    assert still_running is None
    assert code == EXIT_STALLED
    assert "lives but does not answer (stopped, or in C code that holds" in the_line([(code, error)])


def test_a_rank_with_an_error_of_its_own_keeps_its_error(tiny_dataset: Path, tmp_path: Path) -> None:
    results = finish(start(tiny_dataset, tmp_path / "run", 40, *DDP, fault=("fail", 1, 6)))
    assert [code for code, _ in results] == [1, 1]
    assert "ArithmeticError: an error of this rank alone" in results[1][1]


def test_no_alarm_in_a_normal_training(tiny_dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "stalls").mkdir(parents=True)
    (run / "stalls" / "alarm.json").write_text('{"rank": 0, "why": "of an earlier start"}')
    assert [code for code, _ in finish(start(tiny_dataset, run, 16, *DDP))] == [0, 0]
    assert [p.name for p in (run / "stalls").iterdir()] == ["alarm.json"]
    assert len(list((run / "heartbeats").glob("rank-*.json"))) == 2
