"""The rows of benchmarks/tasks.py: each has a configuration, and one that fits the weights it begins with."""

from __future__ import annotations

import runpy
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dualroute.training.initial_model import OF_WEIGHTS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return runpy.run_path(str(ROOT / "benchmarks" / "tasks.py"))
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def shape(path: Path) -> dict[str, Any]:
    """What a configuration says of the weights' shapes."""
    model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    return {name: value for name, value in model.items() if name in OF_WEIGHTS}


def test_each_row_has_a_configuration_that_fits_the_weights_it_begins_with(script: dict[str, Any]) -> None:
    for name, task in script["TASKS"].items():
        words = script["command"](name, "dual", 0, Namespace(output=Path("out"), more=[]))
        config = ROOT / words[words.index("--config") + 1]
        assert config.is_file(), name
        if task.begins_with:  # finetune refuses a shape that the weights do not have
            have = shape(ROOT / "configs" / "pretrain" / f"{task.begins_with}.yaml")
            assert shape(config).items() <= have.items(), name


def test_weights_are_prepared_and_pretrained_with_the_attention_of_the_row(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(script["subprocess"], "run", lambda words, check: ran.append(words[3:]))
    folder = script["pretrained"]("books_encoder", "dense", Namespace(output=Path("out")))
    assert [words[0] for words in ran] == ["prepare", "pretrain"]
    assert ran[1][ran[1].index("--model.attention") + 1] == "dense"
    assert ran[1][ran[1].index("--output") + 1] == str(folder) == "out/books_encoder-dense"
