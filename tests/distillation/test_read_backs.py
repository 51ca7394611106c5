"""A packed micro-batch of a distillation asks the device for nothing that the loader can work out."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)

from dualroute.attention.core.layout import LayoutPlan
from dualroute.data.reader import IGNORE_INDEX, collate
from dualroute.distillation import on_policy
from dualroute.distillation.config import DistillationConfig
from dualroute.distillation.module import Distill
from dualroute.distillation.teacher import Teacher
from dualroute.model import DualRoutingTransformer
from dualroute.model.foreign.gpt2_teacher import Gpt2Teacher
from dualroute.training.config import TrainConfig
from dualroute.training.optim_config import OptimConfig
from tests.training.step.test_read_backs import CONFIG, CONTEXT, as_on_cuda, on_device, windows

__all__ = ["as_on_cuda"]  # a fixture


@pytest.fixture(autouse=True)
def never_on_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Distill, "on_policy", False)  # it asks a trainer


def distillation(settings: dict[str, Any] | None = None, teacher: Any = None, **of_teacher: Any) -> Distill:
    """Everything at once: divergence, hidden states and heads of a teacher that reads more blocks."""
    torch.manual_seed(0)
    model = DualRoutingTransformer(CONFIG)
    inside = {"hidden_weight": 0.1, "attention_weight": 0.1}
    config = DistillationConfig(**(inside if settings is None else settings))
    if teacher is None and config.cached_logits is None:
        teacher = Teacher(DualRoutingTransformer(dataclasses.replace(CONFIG, top_k=3, **of_teacher)))
    arguments = (model, OptimConfig(), TrainConfig(), None, {})
    names = ("model", "optim", "train", "tokenizer", "targets_per_byte")
    pairs = [(0, 1)] if config.looks_inside else []
    return Distill(config, teacher, "", pairs, 0, **dict(zip(names, arguments, strict=True)))


def sums(module: Distill, batch: dict[str, Any]) -> Any:
    found = module._loss_sums(batch, 1e-4)
    found.total.backward()
    return found


def loaded(module: Distill, said: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
    """As a process that loads data makes a batch."""
    layouts, additions = module.prepared_by_loader()
    with unset_fake_temporarily():
        parts = [window | (said or {}) for window in windows()]
        return collate(parts, layout=layouts["layout"], additions=additions)


READ_BACK = (DataDependentOutputException, DynamicOutputShapeException)


def gpt2() -> Teacher:
    from transformers import GPT2Config, GPT2LMHeadModel

    class Gpt2(Gpt2Teacher):
        def __init__(self) -> None:  # without a folder
            torch.nn.Module.__init__(self)
            whole = GPT2LMHeadModel(
                GPT2Config(vocab_size=100, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4)
            )
            self.body, self.head = whole.transformer, whole.lm_head
            self.config = dataclasses.replace(CONFIG, max_context=CONTEXT)

    with unset_fake_temporarily():
        return Teacher(Gpt2())


#: settings of the distillation, block of the teacher
KINDS = {
    "the student's blocks": (None, 16),
    "other blocks": (None, 32),
    "other blocks, cut down": ({"top_k": 5, "loss": "reverse_kl"}, 32),
    "gpt2": ({}, 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_micro_batch_reads_nothing_back(kind: str) -> None:
    settings, block = KINDS[kind]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        module = distillation(settings, **({"block": block} if block else {"teacher": gpt2()}))
        batch = loaded(module)
        assert ("teacher_layout" in batch) == (block == 32)
        if block == 16:
            assert module.prepared_by_loader()[0]["layout"].limits == (3, 5), "both models' ways to read"
        assert sums(module, on_device(batch, fake)).total.shape == ()


def said(k: int = 5) -> dict[str, np.ndarray]:
    """What a cache says of a window."""
    rows = (CONTEXT, k)
    ids = np.tile(np.arange(k, dtype=np.int32), (CONTEXT, 1))
    rest = np.full(CONTEXT, np.log(0.5), np.float32)
    return {
        "teacher_log_probs": np.full(rows, np.log(0.5 / k), np.float32),
        "teacher_ids": ids,
        "teacher_rest": rest,
    }


CACHED = {"cached_logits": "logits", "loss": "reverse_kl"}


def test_a_batch_that_a_cache_speaks_of_reads_nothing_back() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        module = distillation(CACHED)
        assert sums(module, on_device(loaded(module, said()), fake)).total.shape == ()


@pytest.mark.parametrize(
    ("missing", "block"), [("layout", 16), ("label_rows", 16), ("layout", 32), ("teacher_layout", 32)]
)
def test_without_what_the_loader_made_it_would(missing: str, block: int) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        module = distillation(block=block)
        batch = loaded(module)
        del batch[missing]
        with pytest.raises(READ_BACK):
            sums(module, on_device(batch, fake))


@pytest.mark.parametrize("block", [16, pytest.param(32, marks=pytest.mark.slow)])
def test_a_generated_batch_reads_back_its_labels_and_nothing_else(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = {"hidden_weight": 0.1, "attention_weight": 0.1}
    settings = inside | {"on_policy_fraction": 1.0, "on_policy_prefix": 6}
    generated_from = loaded(distillation(settings, block=block))
    labels, asked = np.full((2, 11), IGNORE_INDEX), []
    labels[0, 5:] = labels[1, 5:9] = 3

    def on_host(of_device: torch.Tensor) -> np.ndarray:
        asked.append(of_device.shape)
        return labels

    def refused(of_device: torch.Tensor) -> torch.Tensor:
        raise AssertionError("read back")

    build = LayoutPlan.build

    def build_on_host(plan: LayoutPlan, segments: torch.Tensor) -> Any:
        with unset_fake_temporarily():
            return build(plan, torch.ones(segments.shape, dtype=torch.int64))

    monkeypatch.setattr(LayoutPlan, "build", build_on_host)
    # generators have no numbers to draw for a tensor without any
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, rate, generator: self.fill_(rate))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        module = distillation(settings, block=block)
        batch = on_device(generated_from, fake)
        layouts, _ = module.prepared_by_loader()
        how = {"new_tokens": 6, "temperature": 1.0, "eos_id": 2, "draw": (0, 1, 2), "layouts": layouts}
        monkeypatch.setattr(torch.Tensor, "cpu", refused)
        with pytest.raises(AssertionError, match="read back"):
            on_policy.own_continuations(module.model, batch, **how)
        monkeypatch.setattr(on_policy, "drawn_labels", on_host)
        own = on_policy.own_continuations(module.model, batch, **how)
        monkeypatch.setattr(Distill, "on_policy", True)
        assert sums(module, own).total.shape == ()
    assert asked == [(2, 11)]
    assert (int(own["num_targets"]), len(own["label_rows"])) == (10, 10)


@pytest.mark.parametrize("block", [16, 32])  # the student's, and one that needs a layout of its own
def test_what_the_loader_made_changes_no_number(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(Distill, "on_policy", False)
    module = distillation(block=block)
    made, not_made = (sums(module, batch) for batch in (loaded(module), collate(windows())))
    for name in ("total", "loss_sum", "count"):
        assert torch.equal(getattr(made, name), getattr(not_made, name)), name
    assert made.others.keys() == {"divergence", "hidden_loss", "attention_loss"}
    assert all(torch.equal(made.others[name], not_made.others[name]) for name in made.others)
