"""Where the sets lie, and rows of CrowS-Pairs and BBQ for the harness's tasks on local files."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dualroute.errors import UserError

_MOST_ROWS = 10_000_000
#: {set: where its file or folder lies in $DUALROUTE_DATA}
PLACES = {
    "crows_pairs": "fairness/crows_pairs_anonymized.csv.gz",
    "winobias": "fairness/winobias",
    "bbq": "fairness/bbq",
}


def lines_of(path: Path) -> Iterator[str]:
    """Lines of a text file, also of a .gz.

    Raises:
        UserError: It cannot be read, or has too many.
    """
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as stream:
            for number, line in enumerate(stream):
                if number >= _MOST_ROWS:
                    raise UserError(f"{path} has over {_MOST_ROWS:,} lines: give a part of it")
                yield line
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give another file") from error


def table_rows(path: Path, wanted: Iterable[str], **form: Any) -> Iterator[dict[str, str]]:
    """Rows of a table with a header.

    Raises:
        UserError: A column is missing.
    """
    reader = csv.DictReader(lines_of(path), **form)
    missing = [name for name in wanted if name not in (reader.fieldnames or [])]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}, it has {reader.fieldnames}: give another file")
    yield from reader


def crows_rows(path: Path) -> Iterator[dict[str, str]]:
    """sent_more (the more stereotypical), sent_less, bias_type."""
    names = ("sent_more", "sent_less", "bias_type")
    for row in table_rows(path, names):
        yield {name: row[name] for name in names}


def bbq_rows(path: Path) -> Iterator[dict[str, Any]]:
    """context, question, category, context_condition, choices (three) and label; of a folder all categories.

    Raises:
        UserError: A line is of another form, or a label is not among the answers.
    """
    names = ("context", "question", "category", "context_condition")
    for file in sorted(path.glob("*.jsonl*")) if path.is_dir() else [path]:
        for number, line in enumerate(lines_of(file), 1):
            try:
                row = json.loads(line)
                said = {name: str(row[name]) for name in names}
                choices, label = [str(row[f"ans{k}"]) for k in range(3)], row["label"]
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise UserError(f"{file}, line {number} is not of BBQ's form ({error!r})") from error
            if label not in (0, 1, 2):
                raise UserError(f"{file}, line {number}: the label {label!r} is not among 0, 1 and 2")
            yield {**said, "choices": choices, "label": label}
