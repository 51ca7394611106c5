"""What has become of a run, from what lies in its folder.

In: ``config.yaml``, ``heartbeats/``, ``checkpoints/``, the end of ``metrics.jsonl``, and Slurm's queue.
Nothing is written, no weights are read.
"""

from __future__ import annotations

import os
import shlex
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from dualroute.errors import UserError
from dualroute.files import read_limited
from dualroute.model.checkpoint.folder import Checkpoint, scan_checkpoints
from dualroute.training.monitoring.metrics_log import last_metrics
from dualroute.training.resilience.heartbeat import (
    CUT_OFF,
    FAILED,
    RUNNING,
    Beat,
    process_is_gone,
    read_beat,
)

State = Literal[
    "running", "stalled", "silent", "waiting", "finished", "diverged", "failed", "stopped", "empty"
]
#: Folders above a run that are looked into.
DEPTH = 4
#: Seconds after which a rank of another host that has written nothing is called silent.
SILENCE = 300
_CONFIG_BYTES = 1 << 20
#: Minutes that a phase of a step may last where the configuration does not say.
_PHASE_MINUTES = 30.0


@dataclass(frozen=True)
class Run:
    """A run at this moment.

    Attributes:
        folder: Its own.
        state: running; stalled, for longer in one phase than its watchdog allows; silent, on another host
            and not heard of; waiting in Slurm's queue; finished; diverged; failed, by an error or because it
            was killed; stopped, to be gone on with; empty, never begun.
        step: Newest that was told.
        steps: In all; null where nothing says.
        loss: Of the newest validation after the first step, else of the newest step.
        tokens_per_second: Median of the last steps.
        seconds_left: At that speed; null where nothing says.
        checkpoint: The newest finished one.
        resume: The command that goes on; empty where nothing is to be done.
        problem: Why it failed.
        time: When the folder's log last grew, seconds since 1970.
    """

    folder: Path
    state: State
    step: int
    steps: int | None
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    checkpoint: Path | None
    resume: str
    problem: str
    time: float


def find_runs(folder: Path) -> Iterator[Path]:
    """Run folders in and beneath ``folder``, by name; links are not followed.

    Raises:
        UserError: It is no folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the one that holds your runs")
    yield from _beneath(folder, DEPTH)


def _beneath(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "config.yaml").is_file() or (folder / "heartbeats").is_dir():
        yield folder
        return
    if not depth:
        return
    try:
        inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for name in inside:
        if not name.startswith("."):
            yield from _beneath(folder / name, depth - 1)


def read_run(folder: Path) -> Run:
    """What has become of the run in ``folder``."""
    config, checkpoint = _config(folder), _newest(folder)
    said = checkpoint.metadata if checkpoint is not None else {}
    train = last_metrics(folder / "metrics.jsonl", "train", 20)
    validation = last_metrics(folder / "metrics.jsonl", "validation", 1)
    beats = _beats(folder)
    step = max([0, *(beat.step for beat in beats[:1]), *(line["step"] for line in train[-1:])])
    step = max(step, checkpoint.step if checkpoint is not None else 0)
    steps = said.get("max_steps") or config.get("train", {}).get("max_steps")
    finished = checkpoint is not None and isinstance(steps, int) and checkpoint.step >= steps
    state, problem = _state(folder, beats, config, finished, checkpoint is not None)
    loss = _number(
        [
            *(line.get("val/loss") for line in validation if line["step"]),
            *(line.get("train/loss") for line in train[::-1]),
        ]
    )
    speed = _median(line.get("speed/tokens_per_second") for line in train)
    seconds = _median(line.get("speed/step_time") for line in train)
    left = None
    if (
        seconds is not None
        and isinstance(steps, int)
        and state in ("running", "stalled", "silent", "stopped")
    ):
        left = max(steps - step, 0) * seconds
    goes_on = state in ("stopped", "failed", "diverged") and (folder / "config.yaml").is_file()
    words = [
        "dualroute",
        str(said.get("operation") or _operation(config)),
        "--config",
        str(folder / "config.yaml"),
    ]
    return Run(
        folder,
        state,
        step,
        steps if isinstance(steps, int) else None,
        loss,
        speed,
        left,
        checkpoint.folder if checkpoint is not None else None,
        shlex.join(words) if goes_on else "",
        problem,
        _changed(folder),
    )


def _state(
    folder: Path, beats: list[Beat], config: dict[str, Any], finished: bool, saved: bool
) -> tuple[State, str]:
    alive = [beat for beat in beats if beat.state == RUNNING and not process_is_gone(beat)]
    if alive:
        slow = max(alive, key=lambda beat: beat.seconds)
        quiet = time.time() - max(beat.time for beat in alive)
        if quiet > SILENCE:
            return "silent", f"not heard of for {quiet / 60:.0f} minutes ({slow.host}, process {slow.pid})"
        if slow.seconds > 60 * _phase_minutes(config, slow.phase):
            return (
                "stalled",
                f"rank {slow.rank} ({slow.host}): {slow.seconds / 60:.0f} minutes in {slow.phase}",
            )
        return "running", ""
    if finished:
        return "finished", ""
    if str(folder.resolve()) in _queued():
        return "waiting", ""
    errors = [beat for beat in beats if beat.state in (FAILED, CUT_OFF)]
    errors.sort(key=lambda beat: beat.state != FAILED)
    if errors:
        error = errors[0].error
        return ("diverged" if error.startswith("TrainingDiverged") else "failed"), error.partition(": ")[
            2
        ] or error
    killed = [beat for beat in beats if beat.state == RUNNING]
    if killed:
        return "failed", f"rank {killed[0].rank} ({killed[0].host}) was killed in step {killed[0].step}"
    return ("stopped", "") if saved or beats else ("empty", "")


def _phase_minutes(config: dict[str, Any], phase: str) -> float:
    given = config.get("watchdog", {})
    key = {"validation": "validation_minutes", "save": "save_minutes", "start": "start_minutes"}
    minutes = given.get(key.get(phase, "limit_minutes"))
    return float(minutes) if isinstance(minutes, int | float) else _PHASE_MINUTES


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_limited(folder / "config.yaml", _CONFIG_BYTES))
    except (UserError, yaml.YAMLError, RecursionError, UnicodeDecodeError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if value is not None}


def _operation(config: dict[str, Any]) -> str:
    return "finetune" if "task" in config else "distill" if "teacher" in config else "pretrain"


def _newest(folder: Path) -> Checkpoint | None:
    try:
        finished = scan_checkpoints(folder / "checkpoints").finished
    except UserError:
        return None
    return finished[-1] if finished else None


def _beats(folder: Path) -> list[Beat]:
    """Of the newest start: ranks of an earlier one, which had more of them, are left out."""
    ranks = sorted(
        int(path.stem[5:]) for path in folder.glob("heartbeats/rank-*.json") if path.stem[5:].isdecimal()
    )
    beats = [beat for rank in ranks if (beat := read_beat(folder, rank)) is not None]
    if not beats:
        return []
    newest = max(beat.time for beat in beats)
    return [beat for beat in beats if beat.job_start == beats[0].job_start and newest - beat.time < 3600]


def _number(values: list[Any]) -> float | None:
    return next((float(value) for value in values if isinstance(value, int | float)), None)


def _median(values: Iterator[Any]) -> float | None:
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return statistics.median(numbers) if numbers else None


def _changed(folder: Path) -> float:
    for name in ("metrics.jsonl", "log.txt", "config.yaml"):
        try:
            return (folder / name).stat().st_mtime
        except OSError:
            continue
    return 0.0


@cache
def _queued() -> frozenset[str]:
    """Output folders of this user's jobs that Slurm has not begun; none where there is no Slurm."""
    if shutil.which("squeue") is None:
        return frozenset()
    words = ["squeue", "--me", "--noheader", "--states=PENDING", "--format=%o"]
    try:
        told = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return frozenset()
    # `dualroute submit` keeps a job's script in OUTPUT/slurm
    return frozenset(
        str(Path(line.strip()).resolve().parent.parent) for line in told.splitlines() if line.strip()
    )
