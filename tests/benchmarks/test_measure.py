"""Tables of benchmarks: every figure stands in the column that it belongs to."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config):
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    monkeypatch.delitem(sys.modules, "measure", raising=False)
    import measure

    yield measure
    sys.modules.pop("measure", None)


def test_rows_of_different_columns_make_one_table(
    measure, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [
        {"attention": "dense", "256": "0.1", "s": "3"},
        {"attention": "routed", "256": "0.2", "top_k 1": "0.3", "s": "4"},
        {"attention": "local", "s": "5", "note": "short"},
    ]
    measure.show("title", rows, tmp_path, "table")
    with (tmp_path / "table.csv").open(newline="") as stream:
        read = list(csv.DictReader(stream))
    assert list(read[0]) == ["attention", "256", "top_k 1", "s", "note"]
    assert [{key: value for key, value in row.items() if value} for row in read] == rows
    printed = capsys.readouterr().out.splitlines()
    (dense,) = (line for line in printed if "dense" in line)
    assert [cell.strip() for cell in dense.strip("│").split("│")] == ["dense", "0.1", "", "3", ""]
