"""The part task of a suite, and a suite on several ranks."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from dualroute.cli import main
from dualroute.tasks.suite import bootstrap
from tests import warm
from tests.conftest import ROOT
from tests.tasks.made import MOODS, finetune, reviews, write_jsonl
from tests.training.step.test_module import environment


@pytest.mark.slow
def test_a_task_s_metrics_have_bootstrap_errors(tmp_path, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", reviews(80))
    assert finetune(data, tmp_path / "run", *MOODS, "--train.max_steps", "10") == 0
    plain, suite = tmp_path / "plain.json", tmp_path / "suite.json"
    assert main(["evaluate", "--checkpoint", str(tmp_path / "run"), "--output", str(plain)]) == 0
    words = ["--checkpoint", str(tmp_path / "run"), "--suite", "task", "--output", str(suite)]
    assert main(["evaluate", *words]) == 0
    expected = json.loads(plain.read_text())
    (cell,) = json.loads(suite.read_text())["cells"].values()
    assert {score["metric"]: score["value"] for score in cell["scores"]} == pytest.approx(expected["metrics"])
    accuracy = next(score for score in cell["scores"] if score["metric"] == "accuracy")
    assert accuracy["n"] == expected["rows"]
    assert accuracy["higher_is_better"] is True
    share = accuracy["value"]
    textbook = math.sqrt(share * (1 - share) / accuracy["n"])
    assert accuracy["stderr"] == pytest.approx(textbook, rel=0.25)
    capsys.readouterr()
    assert (
        main(["evaluate", "--checkpoint", str(tmp_path / "run"), "--suite", "ruler", "--lengths", "64"]) == 2
    )
    assert "answers a task" in capsys.readouterr().err


def test_the_bootstrap_of_a_mean_is_its_standard_error():
    values = [float(k % 7) for k in range(300)]
    errors = bootstrap(len(values), lambda some: {"mean": statistics.mean(values[k] for k in some)})
    assert errors["mean"] == pytest.approx(statistics.stdev(values) / math.sqrt(300), rel=0.15)


@pytest.mark.slow
def test_two_ranks_share_the_work_and_give_what_one_gives(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", reviews(40))
    (tmp_path / "text.txt").write_text("The film was fine and the story warm.\n" * 40)
    language = ["--task.kind", "text", "--task.columns", "{source: review, answer: mood}"]
    assert finetune(data, tmp_path / "run", *language, "--train.max_steps", "5") == 0
    (tmp_path / "suite.yaml").write_text("parts: [{part: perplexity, text: [./text.txt]}, {part: task}]")
    found = {}
    for count in (1, 2):
        output = tmp_path / f"{count}.json"
        words = ["evaluate", "--checkpoint", str(tmp_path / "run"), "--suite", str(tmp_path / "suite.yaml")]
        printed = warm.ranks(
            count, "dualroute/__main__.py", [*words, "--output", str(output)], cwd=ROOT, env=environment()
        )
        assert printed.count("bits per byte") == 1  # the first rank alone shows the table
        found[count] = json.loads(output.read_text())["cells"]
    assert list(found[1]) == list(found[2])
    for key, cell in found[1].items():
        assert cell["digest"] == found[2][key]["digest"]
        for one, two in zip(cell["scores"], found[2][key]["scores"], strict=True):
            assert one["value"] == pytest.approx(two["value"], rel=1e-5)
