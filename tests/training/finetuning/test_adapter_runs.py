"""Runs that train adapters: killed and resumed, divided among ranks, and what they leave behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from dualroute.cli import main
from dualroute.evaluate.config import EvaluateConfig
from dualroute.evaluate.perplexity import evaluate
from dualroute.model.checkpoint.format import find_checkpoint, load_model
from tests import warm
from tests.conftest import ROOT
from tests.training.checkpointing.runs import killed_in, pretrain
from tests.training.step.test_module import SMALL, curve, environment

STEPS = 10


def options(base: Path, kind: str = "lora") -> tuple[str, ...]:
    return ("--init_from", str(base), "--finetune.adapter", kind, "--finetune.rank", "4")


@pytest.fixture(scope="module")
def unbroken(base: Path, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("lora") / "run"
    assert pretrain(tiny_dataset, output, STEPS, *options(base), "--finetune.dropout", "0.1") == 0
    return output


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_model(find_checkpoint(run)).state_dict()


def test_a_run_leaves_an_ordinary_model_and_its_adapter_beside_it(
    unbroken: Path, base: Path, tiny_dataset: Path
) -> None:
    checkpoint = find_checkpoint(unbroken)
    parent, ours = weights_of(base), weights_of(unbroken)
    assert ours.keys() == parent.keys()
    same = {name for name in ours if torch.equal(ours[name], parent[name])}
    assert same == {name for name in ours if "norm" in name or name.startswith("embedding")}
    found = evaluate(
        EvaluateConfig(str(unbroken), data=str(tiny_dataset), device="cpu", context=64, max_tokens=512)
    )
    assert found.loss == pytest.approx(curve(unbroken, "validation")[STEPS], abs=1e-5)
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= checkpoint.metadata[
        "files"
    ].keys()
    assert json.loads((checkpoint.folder / "adapter/adapter_config.json").read_text())["r"] == 4
    taken = unbroken.with_name("taken")
    assert main(["checkpoint", "export", str(unbroken), "--output", str(taken)]) == 0
    assert all(torch.equal(value, ours[name]) for name, value in weights_of(taken).items())
    state = torch.load(checkpoint.state, weights_only=False)
    assert all(".lora_" in name for name in state["state_dict"])
    assert (
        main(["generate", "--checkpoint", str(unbroken), "--prompt", "The", "--sampling.max_new_tokens", "3"])
        == 0
    )


def test_killed_it_goes_on_as_if_nothing_had_happened(
    unbroken: Path, base: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    more = (*options(base), "--finetune.dropout", "0.1")
    with killed_in(7):
        pretrain(tiny_dataset, output, STEPS, *more)
    assert find_checkpoint(output).step == 4
    assert pretrain(tiny_dataset, output, STEPS, *more) == 0
    theirs = weights_of(unbroken)
    assert all(torch.equal(value, theirs[name]) for name, value in weights_of(output).items())
    assert curve(output) == curve(unbroken)


def test_asynchronous_checkpoints_hold_the_merged_weights(
    unbroken: Path, base: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    more = (*options(base), "--finetune.dropout", "0.1", "--checkpoint.asynchronous", "true")
    assert pretrain(tiny_dataset, tmp_path / "run", STEPS, *more) == 0
    theirs = weights_of(unbroken)
    assert all(torch.equal(value, theirs[name]) for name, value in weights_of(tmp_path / "run").items())


def test_the_weights_beneath_have_to_be_there_and_the_same(
    unbroken: Path, base: Path, tiny_dataset: Path, tmp_path: Path, capsys: Any
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(unbroken, run, symlinks=True)
    assert pretrain(tiny_dataset, other, 6, "--model.tie_embeddings", "false") == 0
    capsys.readouterr()
    assert pretrain(tiny_dataset, run, STEPS + 2, *options(other)) == 2
    assert "init_from was" in capsys.readouterr().err
    # the same place, other weights
    moved = tmp_path / "base"
    shutil.copytree(base, moved, symlinks=True)
    assert pretrain(tiny_dataset, tmp_path / "second", 5, *options(moved)) == 0
    shutil.rmtree(moved)
    shutil.copytree(other, moved, symlinks=True)
    capsys.readouterr()
    assert pretrain(tiny_dataset, tmp_path / "second", 8, *options(moved)) == 2
    assert "trained beside other weights" in capsys.readouterr().err
    shutil.rmtree(moved)
    assert pretrain(tiny_dataset, tmp_path / "second", 8, *options(moved)) == 2
    assert str(moved) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--train.quantization_aware", "int8_weight_only", "--finetune.dropout", "0.1"],
            "give finetune.dropout 0",
        ),
        (["--finetune.targets", "[nothing]"], "'nothing' names no linear layer"),
        (["--finetune.rank", "0"], "finetune.rank is 0"),
        (["--init_from", "null"], "give its checkpoint as init_from"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    base: Path, tiny_dataset: Path, tmp_path: Path, capsys: Any, more: list[str], said: str
) -> None:
    assert (
        pretrain(tiny_dataset, tmp_path / "run", 2, *options(base), "--optim.warmup_steps", "1", *more) == 2
    )
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_without_peft_it_says_what_to_install(
    base: Path, tiny_dataset: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    assert pretrain(tiny_dataset, tmp_path / "run", 2, *options(base), "--optim.warmup_steps", "1") == 2
    assert "needs peft: pip install" in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_of_a_tied_head_leaves_the_embedding_as_it_is(tiny_dataset: Path, tmp_path: Path) -> None:
    """The run's model has a head of its own then; peft adds the adapter to the tied export."""
    tied, run = tmp_path / "tied", tmp_path / "run"
    assert pretrain(tiny_dataset, tied, 5) == 0
    more = (*options(tied), "--finetune.targets", "[head]")
    with killed_in(7):
        pretrain(tiny_dataset, run, STEPS, *more)
    assert pretrain(tiny_dataset, run, STEPS, *more) == 0
    model = load_model(find_checkpoint(run))
    assert not model.config.tie_embeddings
    assert torch.equal(model.embedding.weight, load_model(find_checkpoint(tied)).embedding.weight)
    assert not torch.equal(model.head.weight, model.embedding.weight)
    exported = tmp_path / "exported"
    assert main(["export", "--checkpoint", str(tied), "--output", str(exported), "--format", "hf"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    theirs = peft.PeftModel.from_pretrained(theirs, find_checkpoint(run).folder / "adapter").eval()
    ids = torch.randint(300, (2, 30))
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_divided_it_trains_the_same_and_goes_on_undivided(
    base: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    """ZeRO-3 of one rank to step 8, then a plain process."""
    gentle = (*options(base, "dora"), "--optim.lr", "0.003", "--optim.schedule", "constant")
    divided = ("--parallel.strategy", "deepspeed", "--parallel.zero_stage", "3")
    assert pretrain(tiny_dataset, tmp_path / "alone", STEPS, *gentle) == 0
    ranks(tiny_dataset, tmp_path / "run", 1, 8, "--train.val_every_steps", "50", *gentle, *divided)
    assert pretrain(tiny_dataset, tmp_path / "run", STEPS, *gentle) == 0
    assert curve(tmp_path / "run") == pytest.approx(curve(tmp_path / "alone"), abs=2e-5)
    theirs = load_file(find_checkpoint(tmp_path / "alone").folder / "adapter" / "adapter_model.safetensors")
    ours = load_file(find_checkpoint(tmp_path / "run").folder / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5)


def ranks(dataset: Path, output: Path, count: int, steps: int, *more: str) -> None:
    words = [
        *("pretrain", *SMALL, "--data.path", str(dataset), "--output", str(output)),
        *("--train.max_steps", str(steps), "--monitor.sample_every_steps", "0", *more),
    ]
    warm.ranks(count, "launch/pretrain.py", words[1:], cwd=ROOT, env=environment())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_ranks_train_the_same_adapters_and_resume_elsewhere(
    base: Path, tiny_dataset: Path, tmp_path: Path, strategy: str
) -> None:
    """Two ranks to step 8, one process to the end: losses of a run of one process."""
    gentle = (*options(base, "dora"), "--optim.lr", "0.003", "--optim.schedule", "constant")
    assert pretrain(tiny_dataset, tmp_path / "alone", STEPS, *gentle) == 0
    how = ["--parallel.strategy", "ddp" if strategy == "ddp" else "deepspeed"]
    if strategy != "ddp":
        how += ["--parallel.zero_stage", strategy[-1]]
    output = tmp_path / "run"
    for until in (6, 8):
        ranks(tiny_dataset, output, 2, until, "--train.val_every_steps", "50", *gentle, *how)
    assert pretrain(tiny_dataset, output, STEPS, *gentle) == 0
    assert curve(output) == pytest.approx(curve(tmp_path / "alone"), abs=2e-5)
    theirs = weights_of(tmp_path / "alone")
    for name, value in weights_of(output).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5)
