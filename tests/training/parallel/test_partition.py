"""A second partition of the parameters inside groups of ranks; gradients summed in float32.  Four ranks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import warm
from tests.conftest import ROOT
from tests.training.parallel.processes import strategy_runs
from tests.training.parallel.test_strategy import assert_same, plain_torch
from tests.training.step.test_module import environment

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("four")
    words = [str(folder / name) for name in ("settings.json", "results.json")]
    env = {**environment(), "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    warm.ranks(4, "tests/training/parallel/processes/partition_ranks.py", words, cwd=ROOT, env=env)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


@pytest.mark.parametrize(("name", "run"), [("hpz", {}), ("hpz again", {"accumulation": 2, "clip": 0.5})])
def test_two_groups_of_two_train_like_plain_torch(
    four_ranks: dict[str, Any], name: str, run: dict[str, Any]
) -> None:
    """And twice in one process, as after a roll-back."""
    assert_same(four_ranks[name], plain_torch(steps=8, **run))
    net = strategy_runs.Module({}, [], "adamw", 0).net
    parameters = sum(p.numel() for p in net.parameters())
    # half of them on each of the two ranks of a group, each parameter rounded up to even parts
    assert all(parameters / 2 <= elements <= parameters / 2 + 16 for elements in four_ranks[name]["second"])
    assert four_ranks["flat"]["second"] == [0] * 8
    assert_same(four_ranks["flat"], plain_torch(steps=8))


def test_models_are_divided_one_after_the_other(four_ranks: dict[str, Any]) -> None:
    """As a teacher beside its student is."""
    assert four_ranks["divided"] == [16, 16]


def test_gradients_are_summed_in_float32_where_that_is_asked(four_ranks: dict[str, Any]) -> None:
    assert four_ranks["ddp"] == [False, True], "exact without, and with"
    usual, wide = (four_ranks[name] for name in ("bf16", "bf16, fp32"))
    assert (usual["reduced_in"], wide["reduced_in"]) == ("torch.bfloat16", "torch.float32")
    assert usual["losses"] != wide["losses"]
    for got in (usual, wide):
        assert_same(got, plain_torch(steps=8), tolerance=0.022)
