"""What `dualroute runs` says of runs in every state, and what it removes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dualroute.cli import main
from dualroute.training.monitoring.metrics_log import last_metrics
from dualroute.training.resilience.heartbeat import Beat, beat_path, started_at, this_place
from dualroute.training.runs import state
from dualroute.training.runs.clean import leftovers, size
from dualroute.training.runs.state import read_run
from dualroute.training.runs.table import duration


def run_of(folder: Path, *, step: int | None = None, steps: int = 10, **config: Any) -> Path:
    """A run folder as a training leaves it, with a checkpoint of `step`."""
    folder.mkdir(parents=True)
    settings = {"output": str(folder), "train": {"max_steps": steps}, "seed": 0} | config
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = [
        {"step": n, "event": "train", "train/loss": 5.0 - n / 10, "speed/step_time": 2.0}
        | {"speed/tokens_per_second": 100.0 * n}
        for n in range(1, (step or 0) + 1)
    ]
    lines += [{"step": n, "event": "validation", "val/loss": 6.0 - n / 10} for n in (0, step or 0)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if step:
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        described = {
            "format": "dualroute-checkpoint",
            "version": 1,
            "step": step,
            "max_steps": steps,
            "files": {},
        }
        (checkpoint / "checkpoint.json").write_text(json.dumps(described | {"operation": "pretrain"}))
    return folder


def beat_of(run: Path, rank: int = 0, **changes: Any) -> None:
    own = Beat(rank, "here", this_place(), os.getpid(), started_at(os.getpid()), step=4, time=time.time())
    path = beat_path(run, rank)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(own, **changes))))


GONE = 2**22 - 3  # no process has this number


def test_each_state_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_run(run_of(tmp_path / "new")).state == "empty"
    finished = read_run(run_of(tmp_path / "finished", step=10))
    assert (finished.state, finished.resume, finished.loss) == ("finished", "", 5.0)
    stopped = run_of(tmp_path / "stopped", step=6)
    beat_of(stopped, state="finished")
    told = read_run(stopped)
    assert (told.state, told.step, told.steps, told.seconds_left) == ("stopped", 6, 10, 8.0)
    assert told.tokens_per_second == 350.0
    assert told.resume == f"dualroute pretrain --config {stopped}/config.yaml"
    running = run_of(tmp_path / "running", step=2)
    beat_of(running)
    assert (read_run(running).state, read_run(running).step) == ("running", 4)
    beat_of(running, 1, phase="forward", seconds=2000.0)
    assert read_run(running).state == "stalled"
    assert "rank 1 (here): 33 minutes in forward" in read_run(running).problem
    beat_of(running, 1, phase="validation", seconds=1000.0)
    assert read_run(running).state == "running"
    far = run_of(tmp_path / "far", step=2)
    beat_of(far, place="elsewhere", time=time.time() - 1200)
    assert read_run(far).state == "silent"
    killed = run_of(tmp_path / "killed", step=2)
    beat_of(killed, pid=GONE)
    assert read_run(killed).state == "failed"
    assert "killed in step 4" in read_run(killed).problem
    failed = run_of(tmp_path / "failed", step=2)
    beat_of(failed, state="cut off", error="DistBackendError: connection lost")
    beat_of(failed, 1, state="failed", error="UserError: the disk is full")
    assert (read_run(failed).state, read_run(failed).problem) == ("failed", "the disk is full")
    diverged = run_of(tmp_path / "diverged", step=2)
    beat_of(diverged, state="failed", error="TrainingDiverged: 5 steps in a row were unusable")
    assert read_run(diverged).state == "diverged"
    monkeypatch.setattr(state, "_queued", lambda: frozenset([str(tmp_path / "new")]))
    assert read_run(tmp_path / "new").state == "waiting"


def test_the_table_is_of_all_runs_beneath(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of(tmp_path / "a" / "one", step=10)
    run_of(tmp_path / "b", step=3, task={"kind": "sequence"})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.yaml").write_text("{")
    assert main(["runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "a/one" in said
    assert "finished" in said
    assert f"goes on with: dualroute pretrain --config {tmp_path}/b/config.yaml" in said
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert [Path(run["folder"]).name for run in json.loads(capsys.readouterr().out)] == ["one", "b", "c"]
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err


def test_two_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_of(tmp_path / "one", step=10, optim={"lr": 0.1})
    second = run_of(tmp_path / "two", step=8, optim={"lr": 0.2})
    plot = tmp_path / "both.png"
    assert main(["runs", "compare", str(first), str(second), "--plot", str(plot)]) == 0
    said = capsys.readouterr().out
    assert "optim.lr" in said
    assert "seed" not in said
    assert "4.2000" in said  # the training loss of step 8
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["runs", "compare", str(first), str(tmp_path)]) == 2
    assert "no config.yaml" in capsys.readouterr().err


def test_only_what_no_run_will_use_is_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_of(tmp_path / "done", step=10)
    (done / "checkpoints" / "step-00000011").mkdir()
    (done / "checkpoints" / "step-00000011" / "model.safetensors").write_bytes(b"x" * 3000)
    (done / ".x.json.partial-123").write_text("{")
    empty, running = run_of(tmp_path / "empty"), run_of(tmp_path / "running")
    beat_of(running)
    (running / ".y.partial-5").write_text("being written")
    damaged = run_of(tmp_path / "damaged", step=2)
    (damaged / "checkpoints" / "step-00000002" / "checkpoint.json").write_text("{")
    found = {one.path for one in leftovers(tmp_path)}
    assert found == {empty, done / "checkpoints" / "step-00000011", done / ".x.json.partial-123"}
    assert main(["runs", "clean", str(tmp_path)]) == 2  # nobody is there to be asked
    assert "give --yes" in capsys.readouterr().err
    assert empty.exists()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, status in (("n", 1), ("y", 0)):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert main(["runs", "clean", str(tmp_path)]) == status
        assert empty.exists() == (answer == "n")
    assert "2.9 KiB" in capsys.readouterr().out
    assert running.exists()
    assert not leftovers(tmp_path)
    assert (done / "checkpoints" / "step-00000010" / "checkpoint.json").exists()
    shutil.rmtree(running)
    assert main(["runs", "clean", str(tmp_path), "--yes"]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_small_things(tmp_path: Path) -> None:
    assert [duration(seconds) for seconds in (5, 130, 7300, 200000)] == [
        "5 s",
        "2 min",
        "2 h 1 min",
        "2 d 7 h",
    ]
    assert [size(count) for count in (5, 2048, 3 << 20, 1 << 42)] == ["5 B", "2.0 KiB", "3.0 MiB", "4.0 TiB"]
    assert last_metrics(tmp_path / "none", "train", 3) == []
    lines = [{"step": n, "event": "train"} for n in range(5)]
    (tmp_path / "m").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "ev')
    assert [line["step"] for line in last_metrics(tmp_path / "m", "train", 2)] == [3, 4]
