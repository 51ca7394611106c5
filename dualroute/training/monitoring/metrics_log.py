"""``metrics.jsonl``: what a run measured, one JSON object a line, for scripts and for exact comparison.

:mod:`dualroute.training.monitoring.monitor` writes the lines, on rank zero; :func:`read_metrics` reads
them.  A line is ``{"step": 12, "event": "train", "train/loss": 3.25, …}`` with the same tags as
TensorBoard; events are config, train, validation, router and samples.  Numbers stand in full precision; one
that is not finite is null.

The file belongs to the *training*, not to the process.  Opened by a run that resumes at
step s it loses every line past s, which that run is going to write again, and a last line that a killed
process left half written; so however often a run was stopped, each step stands there once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from dualroute.errors import UserError
from dualroute.files import atomic_path


class MetricsLog:
    """Appends to ``metrics.jsonl``; every line is handed to the operating system at once.

    Args:
        path: The file; its folder is made where it is missing.
        resume_step: Steps finished before; what the file knows of later steps is dropped, and everything
            where this is 0: a new training.

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
            self._stream: TextIO = self.path.open("a", encoding="utf-8")
        except OSError as error:
            problem = error.strerror or type(error).__name__
            raise UserError(f"{self.path} cannot be written ({problem}): choose another folder") from error
        self._resume_step = resume_step

    def _rewind(self, resume_step: int) -> None:
        with atomic_path(self.path) as temporary, temporary.open("w", encoding="utf-8") as kept:
            for line in _lines(self.path) if resume_step else ():
                # the configuration may be another one from here on
                if line["step"] > resume_step or (line["step"] == resume_step and line["event"] == "config"):
                    continue
                kept.write(json.dumps(line) + "\n")
                if line["step"] == resume_step:
                    self._present.add(line["event"])

    def write(self, step: int, event: str, values: Mapping[str, Any]) -> None:
        """Append one line; values are numbers, or anything that JSON can hold."""
        if step == self._resume_step and event in self._present:
            return
        finite = {tag: _finite(value) for tag, value in values.items()}
        self._stream.write(json.dumps({"step": step, "event": event, **finite}, allow_nan=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._stream.close()


def read_metrics(path: str | Path, event: str | None = None) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, all or those of one ``event``, without one that is half written.

    Raises:
        UserError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the metrics.jsonl of a run")
    return [line for line in _lines(path) if event in (None, line["event"])]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as stream:
        for text in stream:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # torn: the process was killed in the middle of it
            if isinstance(line, dict) and isinstance(line.get("step"), int) and "event" in line:
                yield line


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
