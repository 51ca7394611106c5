"""When a job's script asks Slurm to run the job again; tests/slurm has a real Slurm that does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dualroute.errors import RUN_AGAIN
from dualroute.training.resilience.heartbeat import CUT_OFF, FAILED, FINISHED, RUNNING, Heart, beat_path
from dualroute.training.resilience.requeue import FILE, after_failure, count_stall, main, requeue_job, stalled

KILLED, TERMINATED = 137, 143
JOB = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def last_words(run: Path, *states: str, start: str = "7.1") -> None:
    for rank, state in enumerate(states):
        beat = dataclasses.replace(Heart(run, rank).beat(), state=state, job_start=start)
        beat_path(run, rank).write_text(json.dumps(dataclasses.asdict(beat)))


def checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scontrol that shows what stands in a file and writes down what it was asked to requeue."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\n[ "$1" = requeue ] && echo "$2" >> {tmp_path}/asked || cat {tmp_path}/shown\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    (tmp_path / "shown").write_text("JobId=7 JobState=RUNNING Requeue=1 Restarts=1 BatchFlag=1")
    return tmp_path


def asked(slurm: Path) -> list[str]:
    return (slurm / "asked").read_text().split() if (slurm / "asked").exists() else []


@pytest.mark.parametrize(
    ("status", "states", "expected"),
    [
        (RUN_AGAIN, (RUNNING, RUNNING), True),  # the watchdog ended both
        (RUN_AGAIN, (CUT_OFF, RUNNING), True),
        (RUN_AGAIN, (FAILED, CUT_OFF), True),  # one had an error and did not end; the watchdog ended it
        (RUN_AGAIN, (FINISHED, FINISHED), False),  # a signal stopped it, and rank zero has asked already
        (KILLED, (CUT_OFF, RUNNING), True),
        (KILLED, (RUNNING,), True),
        (TERMINATED, (RUNNING, FAILED), False),  # srun ended the others after an error of one
        (KILLED, (), False),  # it never began
        (1, (FAILED, RUNNING), False),
        (2, (RUNNING, RUNNING), False),
        (76, (FAILED, FAILED), False),
    ],
)
def test_a_stall_is_told_from_an_error(
    run: Path, status: int, states: tuple[str, ...], expected: bool
) -> None:
    last_words(run, *states)
    assert stalled(run, status, "7.1") is expected
    assert not stalled(run, status, "7.2")  # what another start left behind


def test_only_stalls_without_progress_are_counted(run: Path) -> None:
    assert [count_stall(run, "7"), count_stall(run, "7")] == [(1, 0), (2, 0)]
    checkpoint(run, 4)
    assert [count_stall(run, "7"), count_stall(run, "7")] == [(1, 4), (2, 4)]
    checkpoint(run, 8)
    assert count_stall(run, "7") == (1, 8)
    (run / "checkpoints" / "step-00000008").rename(run / "checkpoints" / "abandoned-step-00000008")
    assert count_stall(run, "7") == (2, 4)  # it went back, which is no progress
    assert count_stall(run, "8") == (1, 4)  # submitted again
    (run / "stalls" / FILE).write_text("{")
    assert count_stall(run, "8") == (1, 4)


def test_it_is_requeued_so_often_and_no_more(
    run: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(run, 4)
    last_words(run, RUNNING, CUT_OFF)
    assert [after_failure(run, KILLED, 2, JOB) for _ in range(2)] == ["", ""]
    assert "stall 2 since the checkpoint of step 4 (limit 2): Slurm runs" in capsys.readouterr().out
    said = after_failure(run, KILLED, 2, JOB)
    assert "not requeued: this is stall 3 since the checkpoint of step 4, and --stall_requeues is 2" in said
    assert asked(slurm) == ["7", "7"]


@pytest.mark.parametrize(
    ("shown", "reason"),
    [
        ("JobState=CANCELLED Requeue=1 BatchFlag=1", "job 7 is CANCELLED"),
        ("JobState=COMPLETING Requeue=1 BatchFlag=1", "job 7 is COMPLETING"),  # requeued already
        ("JobState=TIMEOUT Requeue=1 BatchFlag=1", "job 7 is TIMEOUT"),
        ("JobState=RUNNING Requeue=0 BatchFlag=1", "may not be requeued"),
        ("JobState=RUNNING Requeue=1 BatchFlag=0", "may not be requeued"),  # of salloc
    ],
)
def test_a_job_that_is_not_to_run_again_does_not(run: Path, slurm: Path, shown: str, reason: str) -> None:
    (slurm / "shown").write_text(shown)
    last_words(run, RUNNING)
    assert reason in after_failure(run, RUN_AGAIN, 3, JOB)
    assert asked(slurm) == []


def test_a_task_of_an_array_is_requeued_alone(slurm: Path) -> None:
    assert requeue_job({**JOB, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}) == ""
    assert asked(slurm) == ["5_2"]


def test_what_is_no_slurm_job_is_not_requeued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert requeue_job({}) == "not a Slurm job"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "scontrol" in requeue_job({"SLURM_JOB_ID": "7"})


def test_the_program_says_nothing_of_an_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last_words(run, FAILED, start="")
    assert main(["--status", "2", "--limit", "3", "--output", str(run)]) == 0
    assert main(["--status", "2", "--limit", "3", "--output", str(run / "nowhere")]) == 0
    said = capsys.readouterr()
    assert said.out + said.err == ""
