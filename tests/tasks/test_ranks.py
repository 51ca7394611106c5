"""A task on several ranks is the task on one."""

from pathlib import Path

import pytest

from dualroute.training.monitoring.metrics_log import read_metrics
from tests import warm
from tests.conftest import ROOT
from tests.tasks.made import MOODS, SMALL, finetune, reviews, write_jsonl
from tests.training.step.test_module import environment

pytestmark = pytest.mark.slow
GENTLE = ("--optim.lr", "0.003", "--train.max_steps", "20")


def figures(run: Path, event: str, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in read_metrics(run / "metrics.jsonl", event)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", reviews(300))


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    assert finetune(data, output, *MOODS, *GENTLE) == 0
    return output


@pytest.mark.parametrize(
    "strategy",
    [("--parallel.strategy", "ddp"), ("--parallel.zero_stage", "2"), ("--parallel.zero_stage", "3")],
)
def test_two_ranks_train_and_score_as_one_does(
    strategy: tuple[str, str], data: Path, alone: Path, tmp_path: Path
) -> None:
    if "zero" in strategy[0]:
        pytest.importorskip("deepspeed")
    output = tmp_path / "run"
    words = [*SMALL, "--data.path", str(data), "--output", str(output), *MOODS, *GENTLE, *strategy]
    warm.ranks(2, "launch/finetune.py", words, cwd=ROOT, env=environment())
    for event, name in (("train", "train/loss"), ("validation", "val/loss"), ("validation", "val/accuracy")):
        ours, theirs = figures(output, event, name), figures(alone, event, name)
        assert ours.keys() == theirs.keys()
        assert [ours[step] for step in theirs] == pytest.approx(list(theirs.values()), abs=2e-4)
