"""``dualroute evaluate``: the metrics of a task's checkpoint on rows; perplexity of any other checkpoint; a
suite (:mod:`dualroute.tasks.suite`) where one is named.

In: a checkpoint and rows with their targets.  Out: a table on the terminal, JSON on request.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dualroute.errors import UserError
from dualroute.evaluate import by_source, perplexity
from dualroute.evaluate.config import EvaluateConfig
from dualroute.files import write_bytes_atomically
from dualroute.log import counted
from dualroute.model.checkpoint.folder import TASK
from dualroute.model.foreign.hub import is_foreign
from dualroute.model.steering import steer
from dualroute.tasks.answer import Answerer, task_checkpoint
from dualroute.tasks.data.problems import Problems
from dualroute.tasks.data.rows import divided, read_rows
from dualroute.tasks.kind import BadRow, Row


@dataclass
class TaskScore:
    """What was measured.

    Attributes:
        metrics: By name.
        rows: Rows with a target and a prediction.
        left_out: Lines for rows that were left out.
        source: Where the rows are from.
    """

    metrics: dict[str, float]
    rows: int
    left_out: list[str]
    source: str


def evaluate_task(answerer: Answerer, source: str | None = None, max_rows: int | None = None) -> TaskScore:
    """Score a checkpoint on rows, read as its training data were.

    Args:
        answerer: With the model.
        source: Rows; null takes those that the training names for it (data.test, data.validation), or the
            part of its rows that it kept for validation.
        max_rows: Of the rows, the first so many.

    Raises:
        UserError: The rows cannot be used.
    """
    kind = answerer.kind
    name, rows, problems = usable_rows(answerer, source, max_rows)
    kind.tally.counts.clear()  # rows are encoded once more, to be answered
    metrics, count = scored_rows(answerer, rows)
    return TaskScore(metrics, count, list(problems.lines(name)), name)


def scored_rows(answerer: Answerer, rows: list[Row]) -> tuple[dict[str, float], int]:
    """The metrics of a checkpoint on rows with their targets, and how many of them were answered."""
    kind = answerer.kind
    predictions = [answer.prediction for answer in answerer.answers(rows)]
    scored = [(row, found) for row, found in zip(rows, predictions, strict=True) if found is not None]
    metrics = kind.score([kind.target(row) for row, _ in scored], [found for _, found in scored])
    if kind.head() is None:
        metrics["perplexity"] = math.exp(min(answerer.next_token_loss([row for row, _ in scored]), 700.0))
    return metrics, len(scored)


def usable_rows(
    answerer: Answerer, source: str | None = None, max_rows: int | None = None
) -> tuple[str, list[Row], Problems]:
    """What is scored on (see :func:`evaluate_task`), its rows with a target, and what was wrong with
    others."""
    data = answerer.said.get("data") or {}
    whole = source or data.get("test") or data.get("validation")
    name, problems = whole or data.get("path"), Problems()
    if name is None:
        raise UserError("give --data: a file or folder of rows to score on")
    placed = _read(data, name, problems, None if whole else data.get("max_rows"))
    if answerer.kind.divides:
        placed = iter(answerer.kind.divide(list(placed))["test"])
    elif whole is None:
        placed = iter(divided(placed, *_division(data))[1])
    return name, _with_target(answerer, name, islice(placed, max_rows), problems), problems


def training_rows(answerer: Answerer) -> list[Row]:
    """The rows that a checkpoint was trained on, for a baseline to learn from."""
    data, problems = answerer.said.get("data") or {}, Problems()
    name = data["path"]
    placed = _read(data, name, problems, data.get("max_rows"))
    if answerer.kind.divides:
        placed = iter(answerer.kind.divide(list(placed))["train"])
    elif data.get("validation") is None:
        placed = iter(divided(placed, *_division(data))[0])
    return _with_target(answerer, name, placed, problems)


def _division(data: dict[str, Any]) -> tuple[float, str | None]:
    return float(data.get("validation_share", 0.1)), data.get("group")


def _read(
    data: dict[str, Any], name: str, problems: Problems, limit: int | None
) -> Iterator[tuple[str, Row]]:
    return read_rows(
        name,
        problems,
        format=data.get("format") or "auto",
        column_names=data.get("column_names"),
        hub_config=data.get("hub_config"),
        limit=limit,
    )


def _with_target(
    answerer: Answerer, name: str, placed: Iterable[tuple[str, Row]], problems: Problems
) -> list[Row]:
    rows: list[Row] = []
    for place, row in placed:
        if not rows:
            answerer.kind.check_columns(row, source=name)
        try:
            answerer.kind.encode(row)  # a target that the model cannot know is not scored
        except BadRow as error:
            problems.add(str(error), place)
            continue
        rows.append(row)
    if not rows:
        lines = list(problems.lines(name))
        raise UserError(lines[0] if lines else f"{name} has no rows to score: give a file with rows")
    return rows


def evaluate_command(config: EvaluateConfig) -> None:
    """``dualroute evaluate``: print the figures, and write them where asked.

    Raises:
        UserError: Any of the inputs cannot be used, or the output cannot be written.
    """
    if config.suite is not None:
        from dualroute.tasks.suite import suite_command

        suite_command(config)
        return
    foreign = is_foreign(config.checkpoint)
    if foreign or config.text is not None or not (task_checkpoint(config.checkpoint).folder / TASK).exists():
        one = config.data is not None or config.text is not None
        (perplexity if one else by_source).evaluate_command(config)
        return
    if config.output is not None and not Path(config.output).parent.is_dir():
        raise UserError(f"--output {config.output}: there is no folder {Path(config.output).parent}: make it")
    answerer = Answerer(config.checkpoint, config.device, config.dtype, config.batch_size)
    steer(answerer.loaded.model, config.scale or "")
    score = evaluate_task(answerer, config.data)
    console = Console()
    for line in score.left_out:
        console.print(line, markup=False)
    table = Table("metric", f"{counted(score.rows, 'row')} of {Path(score.source).name}")
    for name, value in score.metrics.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    console.print(table)
    if config.output is not None:
        figures = {**asdict(score), "evaluation": config.of_one_measure()}
        write_bytes_atomically(config.output, json.dumps(figures, indent=1).encode())
