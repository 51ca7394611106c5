"""``dualroute evaluate``: the metrics of a task's checkpoint on rows; perplexity of any other checkpoint.

In: a checkpoint and rows with their targets.  Out: a table on the terminal, JSON on request.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dualroute.errors import UserError
from dualroute.evaluate import perplexity
from dualroute.evaluate.config import EvaluateConfig
from dualroute.files import write_bytes_atomically
from dualroute.model.checkpoint.folder import TASK
from dualroute.tasks.answer import Answerer, task_checkpoint
from dualroute.tasks.kind import BadRow, Kind, Row
from dualroute.tasks.rows import Problems, divided, read_rows


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
    kind, problems = answerer.kind, Problems()
    rows: list[Row] = []
    name, placed = _rows(answerer, source, problems)
    for place, row in islice(placed, max_rows):
        if not rows:
            kind.check_columns(row, source=name)
        try:
            kind.encode(row)  # a target that the model cannot know is not scored
        except BadRow as error:
            problems.add(str(error), place)
            continue
        rows.append(row)
    if not rows:
        lines = list(problems.lines(name))
        raise UserError(lines[0] if lines else f"{name} has no rows to score: give a file with rows")
    kind.tally.counts.clear()  # rows are encoded once more, to be answered
    predictions = [answer.prediction for answer in answerer.answers(rows)]
    scored = [(row, found) for row, found in zip(rows, predictions, strict=True) if found is not None]
    metrics = kind.score([kind.target(row) for row, _ in scored], [found for _, found in scored])
    if kind.head() is None:
        metrics["perplexity"] = math.exp(min(answerer.next_token_loss([row for row, _ in scored]), 700.0))
    return TaskScore(metrics, len(scored), list(problems.lines(name)), name)


def _rows(
    answerer: Answerer, source: str | None, problems: Problems
) -> tuple[str, Iterator[tuple[str, Row]]]:
    """What is scored on, and its rows."""
    data = answerer.said.get("data") or {}
    whole = source or data.get("test") or data.get("validation")
    name = whole or data.get("path")
    if name is None:
        raise UserError("give --data: a file or folder of rows to score on")
    placed = read_rows(
        name,
        problems,
        format=data.get("format") or "auto",
        column_names=data.get("column_names"),
        hub_config=data.get("hub_config"),
        limit=data.get("max_rows") if whole is None else None,
    )
    if type(answerer.kind).divide is not Kind.divide:
        return name, iter(answerer.kind.divide(list(placed))["test"])
    if whole is None:
        placed = iter(divided(placed, float(data.get("validation_share", 0.1)), data.get("group"))[1])
    return name, placed


def evaluate_command(config: EvaluateConfig) -> None:
    """``dualroute evaluate``: print the figures, and write them where asked.

    Raises:
        UserError: Any of the inputs cannot be used, or the output cannot be written.
    """
    checkpoint = task_checkpoint(config.checkpoint)
    if not (checkpoint.folder / TASK).exists() or config.text is not None:
        perplexity.evaluate_command(config)
        return
    if config.output is not None and not Path(config.output).parent.is_dir():
        raise UserError(f"--output {config.output}: there is no folder {Path(config.output).parent}: make it")
    answerer = Answerer(config.checkpoint, config.device, config.dtype, config.batch_size)
    score = evaluate_task(answerer, config.data)
    console = Console()
    for line in score.left_out:
        console.print(line, markup=False)
    table = Table("metric", f"{score.rows:,} rows of {Path(score.source).name}")
    for name, value in score.metrics.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    console.print(table)
    if config.output is not None:
        figures = {**asdict(score), "evaluation": asdict(config)}
        write_bytes_atomically(config.output, json.dumps(figures, indent=1).encode())
