"""Whole trainings with Muon: killed and resumed, frozen, by depth, as a student; and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dualroute.cli import main
from dualroute.model import DualRoutingTransformer
from dualroute.model.checkpoint.format import find_checkpoint, load_model
from dualroute.model.config import ModelConfig
from dualroute.training.checkpointing.state.reader import open_state
from dualroute.training.finetuning.config import StrategyConfig
from dualroute.training.finetuning.depth import DepthCourse
from dualroute.training.monitoring.metrics_log import read_metrics
from dualroute.training.optim_config import OptimConfig
from dualroute.training.step.module import Pretrain
from dualroute.training.step.optim import HyperParameters, build_optimizer
from tests.sealed import rewrite
from tests.training.checkpointing.runs import killed_in, pretrain
from tests.training.step.test_module import SMALL, curve

MUON = ("--optim.name", "muon", "--optim.muon.lr", "0.02", "--optim.grad_clip", "0.5")
STEPS = 8


@pytest.fixture(scope="module")
def unbroken(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("muon") / "run"
    assert pretrain(tiny_dataset, output, STEPS, *MUON) == 0
    return output


def weights(run: Path) -> dict[str, Tensor]:
    return load_model(find_checkpoint(run)).state_dict()


def assert_equal(ours: Path, theirs: Path) -> None:
    assert curve(ours) == curve(theirs)
    values = weights(theirs)
    assert all(torch.equal(value, values[name]) for name, value in weights(ours).items())


def test_killed_it_goes_on_as_if_nothing_had_happened(
    unbroken: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with killed_in(7):
        pretrain(tiny_dataset, run, STEPS, *MUON)
    assert find_checkpoint(run).step == 4
    state = open_state(find_checkpoint(run))
    with_squares = {name for name in state.shapes if "exp_avg_sq" in state.keys_of(name)}
    assert with_squares == {name for name in state.shapes if "norm" in name or "embedding" in name}
    capsys.readouterr()
    assert pretrain(tiny_dataset, run, STEPS, "--optim.name", "adamw") == 2
    assert "optim.name was muon and is adamw" in capsys.readouterr().err
    assert pretrain(tiny_dataset, run, STEPS, *MUON) == 0
    assert_equal(run, unbroken)


def test_a_state_of_adamw_without_settings_is_refused_by_its_groups(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert pretrain(tiny_dataset, run, 5) == 0
    rewrite(find_checkpoint(run).folder, settings="removed")
    capsys.readouterr()
    assert pretrain(tiny_dataset, run, 7, *MUON) == 2
    assert "optim.name adamw and this run asks for muon" in capsys.readouterr().err
    assert pretrain(tiny_dataset, run, 7, "--optim.embedding_lr", "0.02") == 2
    assert "optim.embedding_lr null and this run asks for a number" in capsys.readouterr().err
    assert pretrain(tiny_dataset, run, 7, "--optim.base_dim", "64") == 2
    assert "optim.base_dim null and this run asks for a number" in capsys.readouterr().err


@pytest.mark.slow
def test_frozen_and_by_depth_it_resumes_exactly(tiny_dataset: Path, tmp_path: Path) -> None:
    more = (*MUON, "--finetune.freeze", "[layers.0.ffn.up]", "--finetune.unfreeze_share", "0.6")
    more = (*more, "--finetune.layer_lr_decay", "0.5", "--model.tie_embeddings", "false")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert pretrain(tiny_dataset, whole, STEPS, *more) == 0
    with killed_in(7):
        pretrain(tiny_dataset, run, STEPS, *more)
    early = weights(run)
    assert pretrain(tiny_dataset, run, STEPS, *more) == 0
    assert_equal(run, whole)
    late, same = weights(run), {"layers.0.ffn.up.weight"}
    moved = {name for name in late if not torch.equal(late[name], early[name])}
    assert moved == set(late) - same


def test_a_late_unit_steps_as_a_muon_that_begins_with_it() -> None:
    """Its mean is shorter than that of one which began with it, and the direction does not depend on that."""
    torch.manual_seed(0)
    model = DualRoutingTransformer(ModelConfig(vocab_size=9, dim=16, num_layers=1, num_heads=2))
    weight, optim = model.layers[0].ffn.up.weight, OptimConfig(name="muon", lr=0.05, weight_decay=0.0)
    course = DepthCourse(StrategyConfig(unfreeze_share=1.0), 1, 8, False)
    optimizer = build_optimizer(model, optim, unit_of=course.unit)
    settings = HyperParameters(optimizer, optim)
    alone = torch.nn.Parameter(weight.detach().clone())
    reference = torch.optim.Muon([alone], lr=0.05, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    draw = torch.Generator().manual_seed(0)
    for step in range(8):
        gradient = torch.randn(weight.shape, generator=draw)
        trained = course.is_trained(1, step)
        weight.grad = gradient if trained else torch.zeros_like(gradient)
        settings.write(optimizer, 0.05, course, step)
        optimizer.step()
        if trained:
            alone.grad = gradient
            reference.step()
        torch.testing.assert_close(weight, alone, rtol=0, atol=0.02 * 0.05 * step)  # theirs is bfloat16
    assert course.begin(1) == 4


def test_a_step_of_a_bad_batch_is_left_out(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Pretrain.training_step

    def spoilt(self: Pretrain, batch: Any, index: int) -> Tensor:
        loss = step(self, batch, index)
        return loss * math.nan if self.trainer.global_step == 4 else loss

    monkeypatch.setattr(Pretrain, "training_step", spoilt)
    run = tmp_path / "run"
    assert pretrain(tiny_dataset, run, 6, *MUON) == 0
    lines = read_metrics(run / "metrics.jsonl", "train")
    assert [line["train/skipped"] for line in lines] == [0, 0, 0, 0, 1, 0]
    state = open_state(find_checkpoint(run))
    assert float(state.step) == 5
    assert all(bool(value.isfinite().all()) for value in weights(run).values())


@pytest.mark.slow
def test_a_student_learns_with_it_and_resumes_exactly(
    unbroken: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def distil(output: Path, *more: str) -> int:
        words = ["distill", *SMALL, "--data.path", str(tiny_dataset), "--teacher", str(unbroken)]
        words += ["--init_from", str(unbroken), "--output", str(output), "--train.max_steps", "8", *MUON]
        words += ["--distill.hidden_weight", "1", "--monitor.sample_every_steps", "0"]
        return main([*words, *more])

    assert distil(tmp_path / "whole") == 0
    with killed_in(7):
        distil(tmp_path / "run")
    assert distil(tmp_path / "run") == 0
    assert_equal(tmp_path / "run", tmp_path / "whole")
    capsys.readouterr()
    pytest.importorskip("peft")
    assert distil(tmp_path / "adapters", "--finetune.adapter", "lora") == 2
    assert "give optim.name adamw" in capsys.readouterr().err
