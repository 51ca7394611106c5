"""``dualroute evaluate``: the metrics of a task's checkpoint on rows; perplexity of any other checkpoint.

In: a checkpoint and rows with their targets.  Out: a table on the terminal, JSON on request.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
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
from dualroute.tasks.rows import Problems, read_rows


@dataclass
class TaskScore:
    """What was measured.

    Attributes:
        metrics: By name.
        rows: Rows with a target and a prediction.
        left_out: Lines for rows that were left out.
    """

    metrics: dict[str, float]
    rows: int
    left_out: list[str]


def evaluate_task(answerer: Answerer, source: str, max_rows: int | None = None) -> TaskScore:
    """Score a checkpoint on rows, read as its training data were.

    Raises:
        UserError: The rows cannot be used.
    """
    kind, data = answerer.kind, answerer.said.get("data") or {}
    problems = Problems()
    rows: list[Row] = []
    read = read_rows(
        source,
        problems,
        format=data.get("format") or "auto",
        column_names=data.get("column_names"),
        limit=max_rows,
    )
    if type(kind).divide is not Kind.divide:
        parts = kind.divide(list(read))
        read = iter(parts["test"] if parts else [])
    for place, row in read:
        if not rows:
            kind.check_columns(row, source=source)
        try:
            kind.encode(row)  # a target that the model cannot know is not scored
        except BadRow as error:
            problems.add(str(error), place)
            continue
        rows.append(row)
    if not rows:
        lines = list(problems.lines(source))
        raise UserError(lines[0] if lines else f"{source} has no rows to score: give a file with rows")
    predictions = [answer.prediction for answer in answerer.answers(rows)]
    scored = [(row, found) for row, found in zip(rows, predictions, strict=True) if found is not None]
    metrics = kind.score([kind.target(row) for row, _ in scored], [found for _, found in scored])
    return TaskScore(metrics, len(scored), list(problems.lines(source)))


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
    data = answerer.said.get("data") or {}
    source = config.data or data.get("test") or data.get("validation")
    if source is None and type(answerer.kind).divide is not Kind.divide:
        source = data.get("path")  # whose test part is known
    if source is None:
        raise UserError("give --data: a file or folder of rows to score on")
    score = evaluate_task(answerer, source)
    console = Console()
    for line in score.left_out:
        console.print(line, markup=False)
    table = Table(*score.metrics, "rows")
    table.add_row(*(f"{value:.4f}" for value in score.metrics.values()), f"{score.rows:,}")
    console.print(table)
    if config.output is not None:
        figures = {**asdict(score), "evaluation": {**asdict(config), "data": source}}
        write_bytes_atomically(config.output, json.dumps(figures, indent=1).encode())
