"""``dualroute runs``: a line for each run."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dualroute.errors import printable
from dualroute.training.runs.config import RunsConfig
from dualroute.training.runs.state import Run, find_runs, read_run

_COLOURS = {
    "running": "green", "finished": "green", "waiting": "cyan", "stopped": "yellow", "silent": "yellow",
    "stalled": "red", "diverged": "red", "failed": "red", "empty": "dim",
}  # fmt: skip


def show_runs(config: RunsConfig) -> None:
    """Print the runs beneath a folder.

    Raises:
        UserError: It is no folder.
    """
    folder = Path(config.folder)
    runs = [read_run(found) for found in find_runs(folder)]
    if config.json:
        print(json.dumps([dataclasses.asdict(run) for run in runs], default=str, indent=1))
        return
    if not runs:
        print(f"there is no run in {folder}")
        return
    table = Table("run", "state", "step", "loss", "tokens/s", "left", "last", box=None, pad_edge=False)
    for run in runs:
        place = run.folder.relative_to(folder) if run.folder != folder else Path(run.folder.name)
        table.add_row(
            printable(str(place)),
            f"[{_COLOURS[run.state]}]{run.state}[/]",
            f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else ""),
            "–" if run.loss is None else f"{run.loss:.3f}",
            "–" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
            "–" if run.seconds_left is None else duration(run.seconds_left),
            f"{duration(time.time() - run.time)} ago" if run.time else "–",
        )
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for run in runs:
        if run.problem or run.resume:
            console.print(
                f"\n{printable(str(run.folder))}: {_what_to_do(run)}", markup=False, highlight=False
            )


def _what_to_do(run: Run) -> str:
    problem = printable(run.problem)
    goes_on = f"goes on with: {run.resume}" if run.resume else ""
    return "\n  ".join(part for part in (problem, goes_on) if part) if problem else goes_on


def duration(seconds: float) -> str:
    """``3 d 4 h``, ``12 min``, ``40 s``."""
    seconds = max(int(seconds), 0)
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{seconds} s"
