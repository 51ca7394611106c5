"""``metrics.jsonl``: what a run measured, one JSON object a line, for scripts and for exact comparison.

:mod:`dualroute.training.monitoring.monitor` writes the lines, on rank zero; :func:`read_metrics` reads
them.  A line is ``{"step": 12, "event": "train", "train/loss": 3.25, …}`` with the same tags as
TensorBoard; events are config, train, validation, router and samples.  Numbers stand in full precision; one
that is not finite is null.

The file belongs to the *training*, not to the process.  Opened by a run that resumes at step s, it gives up
every line past s, which that run is going to write again, and a last line that a killed process left half
written: they move to ``metrics.abandoned.jsonl`` beside it.  So however often a run was stopped, each step
stands there once, and nothing that was measured is deleted.

A disk that is full, or away, does not end a training: lines that cannot be written wait in memory, and one
warning says so.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from dualroute.errors import UserError
from dualroute.files import atomic_path

ABANDONED = "metrics.abandoned.jsonl"
"""What was measured in steps that a run went back behind.  Each move begins with a line
``{"event": "abandoned", "step": s, "time": …}``; what follows stood in ``metrics.jsonl`` as it is."""

_TAIL = 1 << 20  # bytes that `last_metrics` reads
_MOST_WAITING = 64 * 2**20  # bytes of lines that are kept for a disk that takes none


class MetricsLog:
    """Appends to ``metrics.jsonl``; every line is handed to the operating system at once.

    Where it takes none, lines wait and are tried again with each new one; past 64 MiB the oldest are dropped.

    Args:
        path: The file; its folder is made where it is missing.
        resume_step: Steps finished before; what the file knows of later steps moves to `ABANDONED`, and
            everything where this is 0: a new training.

    Raises:
        UserError: The file or its folder cannot be written.
    """

    def __init__(self, path: str | Path, resume_step: int = 0) -> None:
        self.path = Path(path)
        # lines of the very step that the run resumes after: a repeated validation is not logged twice
        self._present: set[str] = set()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._rewind(resume_step)
            self._stream = self.path.open("ab", buffering=0)
        except OSError as error:
            problem = error.strerror or type(error).__name__
            raise UserError(
                f"{self.path} cannot be written ({problem}): make room there, or choose another folder"
            ) from error
        self._waiting: list[bytes] = []
        self._failed = False
        self._resume_step = resume_step

    def _rewind(self, resume_step: int) -> None:
        """Keep what the resumed run will not write again; byte by byte, since lines may be torn."""
        past = any(self._is_past(text, resume_step) for text in _texts(self.path))
        if past:
            self._set_aside(resume_step)
        if past or not all(text.endswith(b"\n") for text in _texts(self.path)):
            with atomic_path(self.path) as temporary, temporary.open("wb") as kept:
                kept.writelines(_ended(t) for t in _texts(self.path) if not self._is_past(t, resume_step))
        self._present = set(self._events_of(resume_step))

    def _set_aside(self, resume_step: int) -> None:
        note = {"event": "abandoned", "step": resume_step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        with self.path.with_name(ABANDONED).open("ab") as aside:
            aside.write(json.dumps(note).encode() + b"\n")
            aside.writelines(_ended(t) for t in _texts(self.path) if self._is_past(t, resume_step))
            aside.flush()
            os.fsync(aside.fileno())  # before they go from where they stood

    def _events_of(self, step: int) -> Iterator[str]:
        return (line["event"] for line in _lines(self.path) if line["step"] == step)

    @staticmethod
    def _is_past(text: bytes, resume_step: int) -> bool:
        line = _parsed(text)
        if line is None or not resume_step:
            return True
        # the configuration may be another one from here on
        return bool(line["step"] > resume_step or (line["step"] == resume_step and line["event"] == "config"))

    def write(self, step: int, event: str, values: Mapping[str, Any]) -> None:
        """Append one line; values are numbers, or anything that JSON can hold."""
        if step == self._resume_step and event in self._present:
            return
        finite = {tag: _finite(value) for tag, value in values.items()}
        line = json.dumps({"step": step, "event": event, **finite}, allow_nan=False) + "\n"
        self._waiting.append(line.encode())
        while len(self._waiting) > 1 and sum(map(len, self._waiting)) > _MOST_WAITING:
            del self._waiting[1]  # of the first the disk may have a part
        try:
            self._write_waiting()
        except OSError as error:
            if not self._failed:
                problem = error.strerror or type(error).__name__
                rank_zero_warn(
                    f"{self.path} cannot be written ({problem}): make room there; training goes on, and what "
                    f"it measures waits in memory"
                )
            self._failed = True
        else:
            self._failed = False

    def _write_waiting(self) -> None:
        while self._waiting:
            written = self._stream.write(self._waiting[0]) or 0
            self._waiting[0] = self._waiting[0][written:]  # the disk may take a part of a line
            if not self._waiting[0]:
                del self._waiting[0]

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        try:
            if not self._stream.closed:
                self._write_waiting()
            self._stream.close()
        except OSError as error:
            problem = error.strerror or type(error).__name__
            rank_zero_warn(f"{len(self._waiting)} lines of {self.path} are lost ({problem})")


def read_metrics(path: str | Path, event: str | None = None) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, all or those of one ``event``, without one that is half written.

    Raises:
        UserError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the metrics.jsonl of a run")
    return [line for line in _lines(path) if event in (None, line["event"])]


def last_metrics(path: Path, event: str, count: int) -> list[dict[str, Any]]:
    """The last lines of one event, at most ``count``, from the end of a file of any size; none without it."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(path.stat().st_size - _TAIL, 0))
            texts = stream.read(_TAIL).split(b"\n")
    except OSError:
        return []
    found = [line for text in texts if (line := _parsed(text)) is not None and line["event"] == event]
    return found[-count:]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    return (line for text in _texts(path) if (line := _parsed(text)) is not None)


def _texts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        yield from stream


def _ended(text: bytes) -> bytes:
    return text if text.endswith(b"\n") else text + b"\n"


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A line of ours, or None: torn (the process was killed in the middle of it), or of somebody else."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    ours = isinstance(line, dict) and isinstance(line.get("step"), int) and isinstance(line.get("event"), str)
    return line if ours else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
