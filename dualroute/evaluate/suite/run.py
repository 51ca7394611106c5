"""A suite from its name to its results: what is ``dualroute evaluate --suite`` but for reading its options.

1. Every part says its cells, and refuses what it cannot do, before anything is measured.
2. Cell by cell: what the output file holds with the same digest is kept, the rest is measured, and the file
   is written after each.
3. A table, and the differences to another result.
"""

from __future__ import annotations

import importlib
import logging
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dualroute.errors import UserError
from dualroute.evaluate.suite.cells import Cell, Score
from dualroute.evaluate.suite.compare import differences
from dualroute.evaluate.suite.config import PartSettings, Suite
from dualroute.evaluate.suite.model import SuiteModel
from dualroute.evaluate.suite.record import (
    Record,
    cell_entry,
    new_record,
    read_record,
    scores_of,
    write_record,
)

log = logging.getLogger(__name__)

#: The cells of a part, for a model.
Builder = Callable[[Any, SuiteModel], list[Cell]]
#: Where those of this package are.
_PARTS = {
    kind: f"dualroute.evaluate.parts.{module}"
    for kind, module in (
        ("perplexity", "perplexity"),
        ("ruler", "ruler"),
        ("lm_eval", "harness"),
        ("fairness", "fairness"),
    )
}


def cells_of(suite: Suite, model: SuiteModel, builders: Mapping[str, Builder]) -> list[Cell]:
    """All cells of a suite.

    Args:
        suite: What to measure.
        model: Of what.
        builders: Of kinds that live elsewhere.

    Raises:
        UserError: A part cannot be measured of this model, or here; names it.
    """
    cells: list[Cell] = []
    for part in suite.parts:
        cells += _build(part, model, builders)
    if not cells:
        raise UserError(f"the suite {suite.name} has nothing to measure")
    return cells


def _build(part: PartSettings, model: SuiteModel, builders: Mapping[str, Builder]) -> list[Cell]:
    build = builders.get(part.kind)
    if build is None and part.kind in _PARTS:
        build = importlib.import_module(_PARTS[part.kind]).cells
    if build is None:
        raise UserError(f"part {part.name}: {part.kind} is not measured in a training: leave it out there")
    try:
        return build(part, model)
    except UserError as error:
        raise UserError(f"part {part.name}: {error}") from error


def run_suite(
    suite: Suite,
    model: SuiteModel,
    *,
    output: str | None = None,
    builders: Mapping[str, Builder] | None = None,
) -> Record:
    """Measure what is not known yet.

    Args:
        suite: What to measure.
        model: Of what.
        output: Where the results are kept, and gone on with; null keeps none.
        builders: {kind: cells} of parts that live elsewhere.

    Raises:
        UserError: See :func:`cells_of`; or the file cannot be read or written, or the model's outputs are no
            finite numbers.
    """
    identity = {"path": str(model.folder), "step": model.loaded.checkpoint.step, **model.identity}
    digested = dict(model.identity)
    cells = cells_of(suite, model, builders or {})
    ranks = model.ranks
    before = ranks.told(lambda: _before(output))
    record = new_record(suite.name, identity)
    kept = 0
    for number, cell in enumerate(cells, 1):
        old = before.get(cell.key)
        if old is not None and old["digest"] == cell.digest(digested):
            record["cells"][cell.key] = old
            kept += 1
            continue
        if ranks.first:
            log.info("%s", f"{number} of {len(cells)}: {cell.key}")
        begin = time.perf_counter()
        measured = cell.measure()
        seconds = time.perf_counter() - begin
        record["cells"][cell.key] = cell_entry(cell, digested, measured, seconds, _peak_megabytes(model))
        if output is not None and ranks.first:
            # what the file held besides stays until the end: a suite may be begun with fewer parts
            write_record(output, {**record, "cells": {**before, **record["cells"]}})
    if output is not None and ranks.first:
        write_record(output, record)
        if kept:
            log.info("%s", f"{kept} of {len(cells)} were measured before and are kept ({output})")
    return record


def _before(output: str | None) -> dict[str, Any]:
    if output is None or not Path(output).exists():
        return {}
    cells: dict[str, Any] = read_record(output, "--output")["cells"]
    return cells


def _peak_megabytes(model: SuiteModel) -> float:
    if model.loaded.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.loaded.device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


# -- what is shown -------------------------------------------------------------------------------------------


def show(record: Record, console: Console | None = None) -> None:
    """A table of all scores."""
    table = Table("part", "measured", "metric", "score", "± standard error", "n", "seconds")
    for column in table.columns[:2]:
        column.overflow = "fold"
    for cell in record["cells"].values():
        for number, score in enumerate(scores_of(cell)):
            first = number == 0
            table.add_row(
                cell["part"] if first else "",
                cell["name"] if first else "",
                score.metric.replace("_", " "),
                figure(score.value),
                error_of(score),
                f"{score.n:,}",
                f"{cell['seconds']:,.1f}" if first else "",
            )
    (console or wide_console()).print(table)


def wide_console() -> Console:
    """One whose lines are long enough for the tables also where no terminal says its width."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def show_differences(record: Record, other: Record, name: str, console: Console | None = None) -> None:
    """A table of what changed against another result."""
    table = Table("measured", "metric", "here", name, "difference", "± standard error", "")
    for one in differences(record, other):
        table.add_row(
            one.key,
            one.metric.replace("_", " "),
            figure(one.ours.value),
            figure(one.theirs.value),
            f"{one.value:+.4f}",
            "–" if one.stderr is None else f"{one.stderr:.4f}",
            one.verdict,
        )
    if not table.row_count:
        raise UserError(f"--compare {name}: nothing in it was measured here too")
    (console or wide_console()).print(table)


def figure(value: float) -> str:
    """Of a score."""
    return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.1f}"


def error_of(score: Score) -> str:
    """The standard error, with the interval where one was drawn."""
    text = "–" if score.stderr is None else figure(score.stderr)
    if score.interval is not None:
        text += f" [{figure(score.interval[0])}, {figure(score.interval[1])}]"
    return text


def flat_scores(record: Record) -> Iterable[tuple[str, Score]]:
    """(PART/CELL/METRIC, score) of every score."""
    for key, cell in record["cells"].items():
        for score in scores_of(cell):
            yield f"{key}/{score.metric}", score
