"""Layers by depth: which are trained yet, how fast, and that a late beginner's Adam is a fresh one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import find_checkpoint, load_model
from dualroute.training.finetuning.config import StrategyConfig
from dualroute.training.finetuning.depth import DepthCourse, course_of, unit_of
from dualroute.training.monitoring.metrics_log import read_metrics
from dualroute.training.optim_config import OptimConfig
from dualroute.training.step.optim import HyperParameters, build_optimizer, parameter_groups
from tests.training.checkpointing.runs import killed_in, pretrain
from tests.training.step.test_module import curve


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("norm.weight", 0), ("head.weight", 0), ("task_head.projection.weight", 0),
        ("layers.3.ffn.up.weight", 1),
        ("layers.0.attention_norm.weight", 4), ("model.layers.1.ffn.up.lora_A.default.weight", 3),
        ("0.layers.2.ffn.gate.weight", 2), ("embedding.weight", 5), ("model.embedding.weight", 5),
    ],
)  # fmt: skip
def test_units_go_from_the_heads_down(name: str, unit: int) -> None:
    assert unit_of(name, 4, embedding_is_head=False) == unit


def test_a_tied_embedding_is_the_head() -> None:
    assert unit_of("embedding.weight", 4, embedding_is_head=True) == 0
    config = StrategyConfig(layer_lr_decay=0.5)
    tied = course_of(config, ModelConfig(vocab_size=9, dim=32, tie_embeddings=True), 10)
    untied = course_of(config, ModelConfig(vocab_size=9, dim=32, tie_embeddings=False), 10)
    assert tied is not None
    assert tied.unit("embedding.weight") == 0
    assert untied is not None
    assert untied.unit("embedding.weight") == untied.num_layers + 1
    assert course_of(StrategyConfig(), ModelConfig(vocab_size=9, dim=32), 10) is None


def test_all_is_trained_once_the_share_of_the_run_is_over() -> None:
    course = DepthCourse(StrategyConfig(unfreeze_share=0.5), 4, 100, False)
    assert [course.begin(unit) for unit in range(6)] == [0, 10, 20, 30, 40, 50]
    assert [course.layers_trained(step) for step in (0, 9, 10, 25, 40, 99)] == [0, 0, 1, 2, 4, 4]
    assert course.figures(5, 1.0) == {"optim/lr_lowest": 1.0, "finetune/layers_trained": 0.0}


def test_rates_fall_by_a_constant_factor() -> None:
    course = DepthCourse(StrategyConfig(layer_lr_decay=0.5), 2, 100, False)
    rates = [course.settings(unit, 7, 1.0, 1e-8, 0.1, (0.9, 0.95))["lr"] for unit in range(4)]
    assert rates == [1.0, 0.5, 0.25, 0.125]


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_a_unit_that_begins_late_is_stepped_by_an_adam_of_its_own(betas: tuple[float, float]) -> None:
    """Against torch's AdamW, built when the unit begins; eps large enough to count."""
    steps, optim = 30, OptimConfig(lr=0.05, betas=betas, eps=0.1, weight_decay=0.3, warmup_steps=1)
    course = DepthCourse(StrategyConfig(unfreeze_share=0.6, layer_lr_decay=0.8), 1, steps, False)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 3)]), "head": nn.Linear(3, 3)}).double()
    start = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = build_optimizer(model, optim, unit_of=course.unit)
    settings, step = HyperParameters(optimizer, optim), 0
    course.hold_back(model, lambda: step)
    alone = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    own: dict[str, torch.optim.AdamW] = {}
    for step in range(steps):
        torch.manual_seed(step)
        rows = torch.randn(5, 3, dtype=torch.float64)
        settings.write(optimizer, 0.05, course, step)
        optimizer.zero_grad()
        model["head"](model["layers"][0](rows)).square().sum().backward()
        for name, value in model.named_parameters():
            unit = course.unit(name)
            if not course.is_trained(unit, step):
                assert not value.grad.any()
                continue
            if name not in own:
                decay = 0.3 if value.ndim == 2 else 0.0
                rate = 0.05 * course.factor(unit)
                own[name] = torch.optim.AdamW(
                    [alone[name]], lr=rate, betas=betas, eps=0.1, weight_decay=decay
                )
            alone[name].grad = value.grad.clone()
            own[name].step()
        optimizer.step()
        for name, value in model.named_parameters():
            torch.testing.assert_close(value, alone[name], rtol=1e-9, atol=1e-12)
    assert not torch.equal(start["layers.0.weight"], model["layers"][0].weight)


def test_groups_are_those_of_before_unless_depth_counts() -> None:
    model = DualRoutingTransformer(ModelConfig(vocab_size=9, dim=32, num_layers=2, num_heads=4))
    assert len(parameter_groups(model, 0.1)) == 2
    course = course_of(StrategyConfig(layer_lr_decay=0.9), model.config, 10)
    assert course is not None
    groups = parameter_groups(model, 0.1, unit_of=course.unit)
    assert [(group["unit"], group["weight_decay"]) for group in groups] == [
        (0, 0.0), (1, 0.1), (1, 0.0), (2, 0.1), (2, 0.0),
    ]  # fmt: skip
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


OPTIONS = (
    *("--finetune.unfreeze_share", "0.8", "--finetune.layer_lr_decay", "0.5"),
    *("--model.tie_embeddings", "false"),
)
STEPS = 10


@pytest.fixture(scope="module")
def unfrozen(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("depth") / "run"
    assert pretrain(tiny_dataset, output, STEPS, *OPTIONS) == 0
    return output


def test_a_run_says_what_it_trains(unfrozen: Path) -> None:
    lines = read_metrics(unfrozen / "metrics.jsonl", "train")
    assert [line["finetune/layers_trained"] for line in lines] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    lowest = [line["optim/lr_lowest"] / line["optim/lr"] for line in lines]
    assert lowest == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125])
    log = (unfrozen / "log.txt").read_text()
    assert "step 4: layers.1 is trained from here on" in log
    assert "step 9: embedding is trained from here on" in log


def test_what_is_not_trained_yet_has_not_moved(unfrozen: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    with killed_in(6):
        pretrain(tiny_dataset, tmp_path / "run", STEPS, *OPTIONS)
    early = load_model(find_checkpoint(tmp_path / "run")).state_dict()  # of step 4
    torch.manual_seed(0)
    start = DualRoutingTransformer(load_model(find_checkpoint(unfrozen)).config).state_dict()
    still = {name for name in start if torch.equal(early[name], start[name])}
    assert still == {name for name in start if name.startswith(("embedding", "layers.0."))}
    assert pretrain(tiny_dataset, tmp_path / "run", STEPS, *OPTIONS) == 0
    assert curve(tmp_path / "run") == curve(unfrozen)
    late = load_model(find_checkpoint(tmp_path / "run")).state_dict()
    assert all(
        torch.equal(late[name], value)
        for name, value in load_model(find_checkpoint(unfrozen)).state_dict().items()
    )
    assert not any(torch.equal(late[name], start[name]) for name in start)


def test_other_shares_are_refused_on_resume(unfrozen: Path, tiny_dataset: Path, capsys: Any) -> None:
    assert pretrain(tiny_dataset, unfrozen, STEPS + 2, *OPTIONS, "--finetune.layer_lr_decay", "0.7") == 2
    assert "finetune.layer_lr_decay was 0.5 and is 0.7" in capsys.readouterr().err


def test_stage_three_is_refused_by_name(tiny_dataset: Path, tmp_path: Path, capsys: Any) -> None:
    stage = ("--parallel.strategy", "deepspeed", "--parallel.zero_stage", "3")
    assert pretrain(tiny_dataset, tmp_path / "run", STEPS, *OPTIONS, *stage) == 2
    assert "finetune.unfreeze_share cannot be used with parallel.zero_stage 3" in capsys.readouterr().err
