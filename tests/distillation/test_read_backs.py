"""A packed micro-batch of a distillation asks the device for nothing that the loader can work out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)

from dualroute.data.reader import collate
from dualroute.distillation.config import DistillationConfig
from dualroute.distillation.module import Distill
from dualroute.distillation.teacher import Teacher
from dualroute.model import DualRoutingTransformer
from dualroute.training.config import OptimConfig, TrainConfig
from tests.training.step.test_read_backs import CONFIG, as_on_cuda, on_device, windows

__all__ = ["as_on_cuda"]  # a fixture


@pytest.fixture(autouse=True)
def never_on_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Distill, "on_policy", False)  # it asks a trainer


def distillation(**of_teacher: Any) -> tuple[Distill, Teacher]:
    """Everything at once: divergence, hidden states and heads of a teacher that reads more blocks."""
    torch.manual_seed(0)
    model = DualRoutingTransformer(CONFIG)
    teacher = Teacher(DualRoutingTransformer(dataclasses.replace(CONFIG, top_k=3, **of_teacher)))
    config = DistillationConfig(hidden_weight=0.1, attention_weight=0.1)
    arguments = (model, OptimConfig(), TrainConfig(), None, {})
    names = ("model", "optim", "train", "tokenizer", "targets_per_byte")
    module = Distill(config, teacher, "", [(0, 1)], 0, **dict(zip(names, arguments, strict=True)))
    return module, teacher


def sums(module: Distill, batch: dict[str, Any]) -> Any:
    found = module._loss_sums(batch, 1e-4)
    found.total.backward()
    return found


def collate_outside(plan: Any) -> dict[str, Any]:
    """As a process that loads data makes a batch."""
    with unset_fake_temporarily():
        return collate(windows(), layout=plan)


def test_a_packed_micro_batch_reads_nothing_back() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        module, teacher = distillation()
        plan = teacher.with_its_layout(module.model.layout_plan())
        assert plan.limits == (3, 5), "both models' ways to read documents"
        batch = collate_outside(plan)
        assert sums(module, on_device(batch, fake)).total.shape == ()


@pytest.mark.parametrize("missing", ["layout", "label_rows", "the teacher's layout"])
def test_without_what_the_loader_made_it_would(missing: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        module, teacher = distillation()
        batch = collate_outside(teacher.with_its_layout(module.model.layout_plan()))
        if missing in batch:
            del batch[missing]
        else:
            teacher._shares_layout = False
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            sums(module, on_device(batch, fake))


@pytest.mark.parametrize("block", [16, 32])  # the student's, and one that needs a layout of its own
def test_what_the_loader_made_changes_no_number(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(Distill, "on_policy", False)
    module, teacher = distillation(block=block)
    plan = teacher.with_its_layout(module.model.layout_plan())
    made, not_made = (sums(module, collate(windows(), **more)) for more in ({"layout": plan}, {}))
    for name in ("total", "loss_sum", "count"):
        assert torch.equal(getattr(made, name), getattr(not_made, name)), name
    assert made.others.keys() == {"divergence", "hidden_loss", "attention_loss"}
    assert all(torch.equal(made.others[name], not_made.others[name]) for name in made.others)
