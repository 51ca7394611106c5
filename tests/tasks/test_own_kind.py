"""A user adds a kind in one file: the file that docs/tasks.md shows."""

import json
import re
from pathlib import Path

import pytest

from dualroute.cli import main
from dualroute.errors import UserError
from dualroute.tasks.kind import find_kind
from dualroute.training.monitoring.metrics_log import read_metrics
from tests.conftest import ROOT
from tests.tasks.made import finetune, reviews, write_jsonl


@pytest.mark.slow
def test_the_kind_that_the_page_shows_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    kind = tmp_path / "stars.py"
    kind.write_text(source, encoding="utf-8")
    rows = [{"text": row["review"], "stars": 5 if row["mood"] == "positive" else 1} for row in reviews(300)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = tmp_path / "run"
    options = ("--task.kind", str(kind), "--task.columns", "{grade: stars}", "--train.max_steps", "40")
    assert finetune(data, run, *options) == 0
    validation = read_metrics(run / "metrics.jsonl", "validation")
    assert validation[-1]["val/within_one"] > 0.9 > validation[0]["val/within_one"]
    output = tmp_path / "answers.jsonl"
    assert main(["predict", "--checkpoint", str(run), "--input", str(data), "--output", str(output)]) == 0
    answers = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert sum(row["prediction"] == row["stars"] for row in answers) > 270


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "registers 0 kinds"),
        ("import nothing_of_this_name", "cannot be read as Python"),
        (None, "is not there"),
    ],
)
def test_a_file_that_is_no_kind_is_named(source: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "kind.py"
    if source is not None:
        path.write_text(source, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        find_kind(str(path))
    assert str(path) in str(caught.value)
