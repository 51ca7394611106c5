"""The results of a suite as a JSON file: written after every cell, gone on with by the same command.

    {"format": "dualroute-evaluation", "version": 1, "suite": …, "model": {…},
     "cells": {"PART/NAME": {"digest": …, "setting": …, "scores": [{"metric", "value", "stderr", "n", …}],
                             "details": {…}, "seconds": …, "peak_memory_mb": …}}}

``digest`` is of all that a result depends on, the model among it: a cell whose digest is the same is not
measured again.  ``setting`` leaves the model out, so that two models' results can be told to be of one test.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dualroute.errors import UserError
from dualroute.evaluate.suite.cells import Cell, Measured, Score
from dualroute.files import read_json, write_bytes_atomically

FORMAT, VERSION = "dualroute-evaluation", 1
Record = dict[str, Any]


def new_record(suite: str, model: dict[str, Any]) -> Record:
    """One without results."""
    return {"format": FORMAT, "version": VERSION, "suite": suite, "model": model, "cells": {}}


def read_record(path: str | Path, what: str) -> Record:
    """A file of results.

    Args:
        path: Of the file.
        what: The option that named it.

    Raises:
        UserError: It is missing, damaged, or something else.
    """
    try:
        found = read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{what} {path} is not there: give the --output of another suite") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{what} {path} holds no results of a suite: give another file")
    if found.get("version") != VERSION:
        raise UserError(f"{what} {path} is of version {found.get('version')!r}: measure again")
    try:
        for cell in found["cells"].values():
            [str(cell[name]) for name in ("digest", "setting")]
            scores_of(cell)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{what} {path} is damaged ({error!r}): remove it, and measure again") from error
    return found


def scores_of(cell: dict[str, Any]) -> list[Score]:
    """The scores of a cell as it stands in the file."""
    scores = []
    for said in cell["scores"]:
        interval, told = said.get("interval"), str(said.get("observations", ""))
        pairs = (one.split("/") for one in told.split())
        known = {
            "interval": None if interval is None else tuple(interval),
            "observations": tuple((float(a), float(b)) for a, b in pairs),
        }
        scores.append(Score(**{**said, **known}))
        if not isinstance(scores[-1].value, int | float) or not math.isfinite(scores[-1].value):
            raise ValueError(f"the value of {scores[-1].metric} is {scores[-1].value!r}")
    return scores


def cell_entry(
    cell: Cell, model: dict[str, Any], measured: Measured, seconds: float, megabytes: float
) -> dict[str, Any]:
    """What is written of a cell."""
    return {
        "part": cell.part,
        "name": cell.name,
        "digest": cell.digest(model),
        "setting": cell.digest({}),
        "scores": [score.to_json() for score in measured.scores],
        "details": measured.details,
        "seconds": round(seconds, 2),
        "peak_memory_mb": round(megabytes),
    }


def write_record(path: str | Path, record: Record) -> None:
    """Write the file, whole or not at all.

    Raises:
        UserError: It cannot be written.
    """
    try:
        write_bytes_atomically(path, json.dumps(record, indent=1, ensure_ascii=False).encode())
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror or error}") from error
