"""Weights that stay as they are: by pattern, through a whole run, and when it is resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dualroute.cli import main
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import find_checkpoint, load_model
from dualroute.training.finetuning.freezing import freeze, frozen_names, with_frozen, without_frozen
from tests.training.checkpointing.runs import killed_in, pretrain
from tests.training.finetuning.test_adapter_runs import ranks
from tests.training.step.test_module import curve

STEPS = 10
FROZEN = ("--finetune.freeze", "[embedding, layers.0.*, '*norm*']")


def build(tie: bool) -> DualRoutingTransformer:
    return DualRoutingTransformer(
        ModelConfig(vocab_size=9, dim=32, num_layers=2, num_heads=4, tie_embeddings=tie)
    )


@pytest.mark.parametrize("tie", [True, False])
def test_patterns_name_parameters_or_modules(tie: bool) -> None:
    model = build(tie)
    freeze(model, ["embedding", "layers.0", "layers.*.ffn_norm.weight"])
    names = frozen_names(model)
    heads = {"embedding.weight", "head.weight"} if tie else {"embedding.weight"}
    layer = {name for name in model.state_dict() if name.startswith("layers.0.")}
    assert names == heads | layer | {"layers.1.ffn_norm.weight"}
    state = without_frozen(model, model.state_dict())
    assert state.keys() == model.state_dict().keys() - names
    assert with_frozen(model, state).keys() == model.state_dict().keys()


def test_a_pattern_that_matches_nothing_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(
        UserError, match=r"'layer\.0' matches no parameter; there are embedding\.weight, layers\.\*"
    ):
        freeze(build(True), ["layer.0"])
    with pytest.raises(UserError, match="leaves nothing to train"):
        freeze(build(True), ["*"])


@pytest.fixture(scope="module")
def frozen(base: Path, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("frozen") / "run"
    assert pretrain(tiny_dataset, output, STEPS, "--init_from", str(base), *FROZEN) == 0
    return output


def state(run: Path) -> dict[str, torch.Tensor]:
    return load_model(find_checkpoint(run)).state_dict()


def test_what_is_frozen_is_that_of_the_parent(frozen: Path, base: Path) -> None:
    ours, theirs = state(frozen), state(base)
    same = {name for name in ours if torch.equal(ours[name], theirs[name])}
    assert same == {n for n in ours if n.startswith(("embedding", "layers.0.")) or "norm" in n}
    assert " parameters are trained, " in (frozen / "log.txt").read_text()
    taken = frozen.with_name("taken")
    assert main(["checkpoint", "export", str(frozen), "--output", str(taken)]) == 0
    assert all(torch.equal(value, ours[name]) for name, value in state(taken).items())
    saved = torch.load(find_checkpoint(frozen).state, weights_only=False)["state_dict"]
    assert {name.removeprefix("model.") for name in saved} == ours.keys() - same


def test_killed_it_goes_on_without_the_weights_that_it_began_with(
    frozen: Path, base: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(base, parent, symlinks=True)
    more = ("--init_from", str(parent), *FROZEN)
    with killed_in(7):
        pretrain(tiny_dataset, tmp_path / "run", STEPS, *more)
    shutil.rmtree(parent)
    assert pretrain(tiny_dataset, tmp_path / "run", STEPS, *more) == 0
    assert curve(tmp_path / "run") == curve(frozen)
    theirs = state(frozen)
    assert all(torch.equal(value, theirs[name]) for name, value in state(tmp_path / "run").items())


def test_other_patterns_are_refused_on_resume(
    frozen: Path, base: Path, tiny_dataset: Path, capsys: Any
) -> None:
    more = ("--init_from", str(base), "--finetune.freeze", "[embedding]")
    assert pretrain(tiny_dataset, frozen, STEPS + 2, *more) == 2
    assert (
        "finetune.freeze was ['embedding', 'layers.0.*', '*norm*'] and is ['embedding']"
        in capsys.readouterr().err
    )


def test_a_wrong_pattern_ends_the_run_before_it_starts(
    tiny_dataset: Path, tmp_path: Path, capsys: Any
) -> None:
    assert pretrain(tiny_dataset, tmp_path / "run", STEPS, "--finetune.freeze", "[encoder]") == 2
    assert "'encoder' matches no parameter" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["0", "3"])
def test_ranks_leave_the_same_as_they_are(base: Path, tiny_dataset: Path, tmp_path: Path, stage: str) -> None:
    """Two ranks under DeepSpeed, resumed by the same, then by one process alone."""
    gentle = ("--init_from", str(base), *FROZEN, "--optim.lr", "0.003", "--optim.schedule", "constant")
    how = (
        "--parallel.strategy",
        "deepspeed",
        "--parallel.zero_stage",
        stage,
        "--train.val_every_steps",
        "50",
    )
    for until in (6, 8):
        ranks(tiny_dataset, tmp_path / "run", 2, until, *gentle, *how)
    assert pretrain(tiny_dataset, tmp_path / "run", STEPS, *gentle) == 0
    assert pretrain(tiny_dataset, tmp_path / "alone", STEPS, *gentle) == 0
    assert curve(tmp_path / "run") == pytest.approx(curve(tmp_path / "alone"), abs=2e-5)
    ours, theirs = state(tmp_path / "run"), state(base)
    same = {name for name in ours if torch.equal(ours[name], theirs[name])}
    assert same == {n for n in ours if n.startswith(("embedding", "layers.0.")) or "norm" in n}
