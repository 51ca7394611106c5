"""A row of the acceptance table, the file in which a part leaves its rows, and a part's command line.

Rows are left one by one: a part that dies half-way has left what it had found until then.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        part, what: Which.
        found: Figures in words.
        wanted: What makes it pass; empty where it is only reported.
        passed: None where it could not be looked at here, and `found` says why.
        milliseconds: Median time of what was timed.
        peak_mebibytes: Memory that it needed at its peak.
    """

    part: str
    what: str
    found: str
    wanted: str = ""
    passed: bool | None = True
    milliseconds: float | None = None
    peak_mebibytes: float | None = None

    @property
    def verdict(self) -> str:
        return "skipped" if self.passed is None else "pass" if self.passed else "**FAIL**"

    def __str__(self) -> str:
        return f"{self.verdict}: {self.part}, {self.what}: {self.found}"


class Rows:
    """The rows of one part, appended to a file."""

    def __init__(self, part: str, path: Path) -> None:
        self.part, self.path = part, path

    def add(
        self, what: str, found: str, wanted: str = "", passed: bool | None = True, **figures: float
    ) -> None:
        row = Row(self.part, what, found, wanted, passed, **figures)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(dataclasses.asdict(row)) + "\n")
        print(row, flush=True)


def given(parts: Iterable[str], description: str) -> argparse.Namespace:
    """The command line that all parts have; `rows` are the named part's."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=Path, required=True, help="file that gets a line for each row")
    parser.add_argument("--work", type=Path, required=True, help="folder for what parts of a run share")
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    options.rows = Rows(options.part, options.rows)
    return options


def read(path: Path) -> list[Row]:
    """What a part has left."""
    if not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line]


def markdown(rows: list[Row]) -> str:
    """The table."""
    lines = [
        "| part | what | result | found | wanted | median ms | peak MiB |",
        "|---|---|---|---|---|---:|---:|",
    ]
    for row in rows:
        figures = [_number(row.milliseconds), _number(row.peak_mebibytes)]
        cells = [row.part, row.what, row.verdict, row.found, row.wanted, *figures]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
