"""The speedrun: recipes that are trained for real, and what is read off their curves."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.benchmarks.scripts import load
from tests.training.step.test_module import SMALL


@pytest.fixture(scope="module")
def speedrun() -> ModuleType:
    return load("training/speedrun.py")


def test_where_a_curve_comes_to_a_value(speedrun: ModuleType) -> None:
    points = [{"tokens": float(t), "bits per byte": b} for t, b in ((0, 4.0), (100, 3.0), (200, 2.0))]
    assert speedrun.reached(points, 2.5, "tokens") == 150
    assert speedrun.reached(points, 2.0, "tokens") == 200
    assert speedrun.reached(points, 1.9, "tokens") is None


def test_the_table_compares_seed_by_seed_with_the_first(speedrun: ModuleType) -> None:
    def points(*values: float) -> list[dict[str, float]]:
        return [
            {"tokens": 100.0 * n, "cpu seconds": 7.0 * n, "wall seconds": 9.0 * n, "bits per byte": value}
            for n, value in enumerate(values)
        ]

    curves = {
        "slow": [points(4.0, 3.0, 2.0), points(4.0, 3.0, 2.2), points(4.0, 3.0, 2.1)],
        "fast": [points(4.0, 2.0, 1.5), points(4.0, 2.2, 1.4), points(4.0, 2.1, 1.8)],
    }
    slow, fast = speedrun.table(curves, {"slow": 100.0, "fast": 120.0})
    assert (slow["bits per byte"], slow["worst"]) == ("2.1000", "2.2000")
    assert (fast["bits per byte"], fast["worst"]) == ("1.5000", "1.8000")
    assert slow["tokens to the first's end"] == "1.00"
    assert fast["CPU s to the first's end"] == "0.50"
    (never,) = speedrun.table({"fast": curves["fast"], "slow": curves["slow"]}, {"slow": 1.0, "fast": 1.0})[
        1:
    ]
    assert never["tokens to the first's end"] == "not reached"


@pytest.mark.slow
def test_recipes_are_trained_once_and_compared(
    speedrun: ModuleType, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Path] = []

    def run(command: list[str], check: bool) -> None:
        assert check
        assert command[2] == "--one"
        trained.append(Path(command[3]))
        assert speedrun.train_one(Path(command[3]), command[4:]) == 0

    monkeypatch.setattr(speedrun, "subprocess", SimpleNamespace(run=run))
    words: list[Any] = ["speedrun.py", "--data", tiny_dataset, "--output", tmp_path, "--tokens", 3072]
    words += ["--recipes", "adamw", "muon", "--more", "muon, slower=--optim.name muon --optim.muon.lr 0.001"]
    words += ["--extra", *SMALL, "--train.val_every_steps", "3"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    speedrun.main()
    assert [folder.name for folder in trained] == ["adamw-s0", "muon-s0", "muon_slower-s0"]
    names = [yaml.safe_load((folder / "config.yaml").read_text())["optim"]["name"] for folder in trained]
    assert names == ["adamw", "muon", "muon"]
    with (tmp_path / "speedrun_curves.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["recipe"], row["step"], row["tokens"]) for row in rows[:3]] == [
        ("adamw", "0", "0"), ("adamw", "3", "1536"), ("adamw", "6", "3072"),
    ]  # fmt: skip
    assert 0 < float(rows[1]["cpu seconds"]) < float(rows[2]["cpu seconds"])
    speedrun.main()
    assert len(trained) == 3, "what is finished is not trained again"


def test_recipes_that_are_not_there_are_named(
    speedrun: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (["--recipes", "adam"], "'adam': there are adamw, muon"),
        (["--more", "mine"], "'mine': give NAME=OPTIONS"),
    ):
        monkeypatch.setattr(sys, "argv", ["speedrun.py", *words])
        with pytest.raises(SystemExit):
            speedrun.main()
        assert message in capsys.readouterr().err
