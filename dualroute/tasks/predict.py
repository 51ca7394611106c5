"""``dualroute predict``: rows in, the same rows with a prediction out.

In: a checkpoint that was trained for a task, and rows, read as they come.  Out: a line of JSON for each row,
in their order: its own columns, then the prediction's; ``problem`` says why a row has none.  Where a row has
a column of that name already, that one stays, and the prediction's has an underscore more (``prediction_``).

What is written so far lies in ``OUTPUT.partial``.  The same command goes on after its last whole line, if
checkpoint and input are the ones that it was begun with (``OUTPUT.partial.json``).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from dualroute.errors import UserError
from dualroute.files import fsync_folder, read_json, write_bytes_atomically
from dualroute.log import counted
from dualroute.model.checkpoint.folder import WEIGHTS
from dualroute.tasks.answer import Answer, Answerer
from dualroute.tasks.config import PredictConfig
from dualroute.tasks.data.problems import Problems
from dualroute.tasks.data.rows import read_rows, source_digest
from dualroute.tasks.kind import Row

log = logging.getLogger(__name__)
_PROBLEM = "problem"


def predict_command(config: PredictConfig) -> None:
    """Answer the rows of a file; see the module's docstring.

    Raises:
        UserError: Checkpoint, input or output cannot be used.
    """
    output = Path(config.output)
    if output.exists():
        raise UserError(f"--output {output} is there already: remove it, or give another file")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}: make it")
    answerer = Answerer(config.checkpoint, config.device, config.dtype, config.batch_size)
    problems = Problems()
    rows = (
        row
        for _, row in read_rows(
            config.input, problems, format=config.format, column_names=config.column_names
        )
    )
    first = next(rows, None)
    if first is None:
        raise UserError(f"{config.input} has no rows to answer: give a file with rows")
    answerer.kind.check_columns(first, with_target=False, source=config.input)
    partial = output.with_name(f"{output.name}.partial")
    done = _begin(partial, _identity(config, answerer))
    if done:
        log.info("%s", f"{partial} has {counted(done, 'row')} already: going on after them")
    unanswered = _write(partial, answerer.answers(islice(chain([first], rows), done, None)))
    os.replace(partial, output)
    _identity_file(partial).unlink(missing_ok=True)
    fsync_folder(output.parent)
    for line in problems.lines(config.input):
        log.warning("%s", line)
    if unanswered:
        log.warning("%s", f"{counted(unanswered, 'row')} without a prediction: see the column {_PROBLEM!r}")
    for line in answerer.kind.tally.lines():
        log.warning("%s", line)
    log.info("%s", f"{counted(problems.rows - problems.bad, 'row')} → {output}")


def _identity(config: PredictConfig, answerer: Answerer) -> dict[str, Any]:
    """What a prediction that is gone on with must have in common with its beginning."""
    files = answerer.loaded.checkpoint.metadata.get("files", {})
    return {
        "weights": files.get(WEIGHTS, {}).get("sha256"),
        "input": source_digest(config.input),
        "columns": config.column_names,
        "format": config.format,
    }


def _identity_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _begin(partial: Path, identity: dict[str, Any]) -> int:
    """Rows that ``partial`` has already; a line that was cut short goes.

    Raises:
        UserError: It was begun with another checkpoint or input.
    """
    note = _identity_file(partial)
    if not partial.exists() or not note.exists():
        write_bytes_atomically(note, json.dumps(identity).encode())
        partial.write_bytes(b"")
        return 0
    if read_json(note) != identity:
        raise UserError(
            f"{partial} was begun with another checkpoint or input: remove it, or give another --output"
        )
    rows, end = 0, 0
    with partial.open("rb+") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                rows, end = rows + 1, end + len(line)
        stream.truncate(end)
    return rows


def _write(partial: Path, answers: Iterator[Answer]) -> int:
    """Append a line for each answer; how many have no prediction."""
    unanswered = 0
    with partial.open("a", encoding="utf-8") as stream:
        for number, answer in enumerate(answers):
            stream.write(json.dumps(_line(answer), ensure_ascii=False, default=str) + "\n")
            unanswered += answer.prediction is None
            if number % 512 == 511:
                stream.flush()
        stream.flush()
        os.fsync(stream.fileno())
    return unanswered


def _line(answer: Answer) -> Row:
    line = {
        name: value for name, value in answer.row.items() if not isinstance(value, np.ndarray)
    }  # no pixels
    for name, value in (answer.prediction or {_PROBLEM: answer.problem}).items():
        while name in answer.row:
            name += "_"
        line[name] = value
    return line
