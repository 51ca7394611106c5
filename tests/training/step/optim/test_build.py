"""Who is decayed, how the learning rate runs, and which steps the guard leaves out."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dualroute.errors import UserError
from dualroute.training.config import SpikeGuardConfig
from dualroute.training.optim_config import OptimConfig
from dualroute.training.step.optim import (
    HyperParameters,
    build_optimizer,
    lr_at,
    parameter_groups,
    place_counts,
)
from dualroute.training.step.spike_guard import SpikeGuard, TrainingDiverged

Schedule = st.sampled_from(["cosine", "wsd", "constant"])


class Tiny(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.norm = nn.RMSNorm(4)
        self.linear = nn.Linear(4, 4)
        self.gate_weight = nn.Parameter(torch.zeros(2, 4))
        self.gate = nn.Linear(4, 4, bias=False)  # as in SwiGLU: a matrix like any other
        self.head = nn.Linear(4, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def names(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    chosen = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in chosen}


def test_only_matrices_decay() -> None:
    model = Tiny(tied=False)
    decayed, kept = parameter_groups(model, 0.1)
    assert names(model, decayed["params"]) == {"linear.weight", "gate.weight", "head.weight"}
    assert names(model, kept["params"]) == {"embedding.weight", "norm.weight", "linear.bias", "gate_weight"}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_a_tied_weight_is_the_embedding_and_counted_once(decay_embeddings: bool) -> None:
    model = Tiny()
    decayed, kept = parameter_groups(model, 0.1, decay_embeddings=decay_embeddings)
    assert ("embedding.weight" in names(model, decayed["params"])) == decay_embeddings
    parameters = [*decayed["params"], *kept["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(model.parameters()))


def test_zero_3_partitions_are_judged_by_their_real_shape() -> None:
    model = Tiny(tied=False)
    before = [names(model, group["params"]) for group in parameter_groups(model, 0.1)]
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert [names(model, group["params"]) for group in parameter_groups(model, 0.1)] == before


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = Tiny()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.gate_weight)
    (only,) = parameter_groups(model, 0.1)
    assert names(model, only["params"]) == {"gate_weight"}
    model.gate_weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model, 0.1)


def test_weight_decay_moves_matrices_only() -> None:
    """With zero gradients AdamW's whole step is the decay: p ← p · (1 - lr · weight_decay)."""
    model = Tiny(tied=False)
    optimizer = build_optimizer(model, OptimConfig(lr=0.5, weight_decay=0.1, warmup_steps=0))
    assert isinstance(optimizer, torch.optim.AdamW)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in ("linear.weight", "gate.weight", "head.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


@given(
    schedule=Schedule,
    total=st.integers(1, 400),
    warmup=st.integers(0, 400),
    ratio=st.floats(0, 1),
    fraction=st.floats(0.01, 1),
)
def test_learning_rate_rises_then_never_rises_again(
    schedule: str, total: int, warmup: int, ratio: float, fraction: float
) -> None:
    warmup = min(warmup, total)
    config = OptimConfig(
        lr=0.5,
        warmup_steps=warmup,
        schedule=schedule,  # type: ignore[arg-type]
        min_lr_ratio=ratio,
        decay_fraction=fraction,
    )
    rates = [lr_at(step, total, config) for step in range(total + 3)]
    rise, fall = rates[:warmup], rates[warmup:]
    assert all(0 < a < b for a, b in itertools.pairwise(rise))
    assert all(a >= b for a, b in itertools.pairwise(fall))
    assert max(rates) <= 0.5
    if warmup:
        assert rates[warmup - 1] == pytest.approx(0.5)
    if warmup < total:
        assert rates[warmup] == pytest.approx(0.5)
    if schedule == "constant":
        assert set(fall) == {0.5}
    else:
        assert fall[-1] == pytest.approx(0.5 * ratio)
        assert all(rate > 0 for rate in rates[:total]), "no step may be without effect"


def test_known_points_of_the_schedules() -> None:
    cosine = OptimConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    assert lr_at(0, 110, cosine) == pytest.approx(0.1)
    assert lr_at(60, 110, cosine) == pytest.approx(0.55)  # half of the cosine
    wsd = OptimConfig(lr=1.0, warmup_steps=10, schedule="wsd", min_lr_ratio=0.0, decay_fraction=0.2)
    assert lr_at(79, 100, wsd) == lr_at(80, 100, wsd) == 1.0
    assert lr_at(85, 100, wsd) == pytest.approx(0.5)  # 1 - sqrt(5/20)
    assert lr_at(100, 100, wsd) == 0.0
    line = dataclasses.replace(wsd, decay_shape="linear")
    assert [lr_at(step, 100, line) for step in (79, 80, 85, 99, 100)] == pytest.approx([1, 1, 0.75, 0.05, 0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "optim.lr"),
        ({"lr": float("nan")}, "optim.lr"),
        ({"betas": (0.9, 1.0)}, "optim.betas"),
        ({"eps": -1.0}, "optim.eps"),
        ({"weight_decay": -0.1}, "optim.weight_decay"),
        ({"warmup_steps": -1}, "optim.warmup_steps"),
        ({"schedule": "linear"}, "optim.schedule is 'linear'"),
        ({"min_lr_ratio": 1.5}, "optim.min_lr_ratio"),
        ({"decay_fraction": 0.0}, "optim.decay_fraction"),
        ({"grad_clip": 0.0}, "optim.grad_clip"),
        ({"name": "lion"}, "optim.name is 'lion'"),
        ({"head_lr": -1.0}, "optim.head_lr"),
        ({"muon": {"momentum": 1.0}}, "optim.muon.momentum"),
        ({"muon": {"steps": 0}}, "optim.muon.steps"),
    ],
)
def test_bad_values_name_their_key(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OptimConfig(**values)  # type: ignore[arg-type]


def stepped(config: OptimConfig, count: int, state: Any = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model after ``count`` steps on seeded gradients, from the weights and state of ``state``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8))
    optimizer = build_optimizer(model, config)
    hyper = HyperParameters(optimizer, config)
    if state is not None:
        model.load_state_dict(state[0].state_dict())
        optimizer.load_state_dict(state[1].state_dict())
    draw = torch.Generator().manual_seed(5)
    for _ in range(count):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        hyper.write(optimizer, config.lr)
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False), (True, True)])
def test_fused_steps_are_the_same_but_for_rounding_and_follow_the_run_that_resumes(
    before: bool, after: bool
) -> None:
    loop = OptimConfig(fused=False, lr=1e-2)
    usual, _ = stepped(loop, 5, stepped(loop, 5))
    model, optimizer = stepped(
        dataclasses.replace(loop, fused=after), 5, stepped(dataclasses.replace(loop, fused=before), 5)
    )
    for ours, theirs in zip(model.parameters(), usual.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert {bool(group["fused"]) for group in optimizer.param_groups} == {after}


def test_a_fused_optimizer_is_clipped_by_lightning_and_is_chosen_on_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    model, optimizer = stepped(OptimConfig(fused=True), 1)
    MixedPrecision("bf16-mixed", "cpu").clip_gradients(optimizer, 0.5)
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert float(total) == pytest.approx(0.5, rel=1e-4)
    assert not build_optimizer(model, OptimConfig()).param_groups[0]["fused"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert build_optimizer(model, OptimConfig()).param_groups[0]["fused"]
    assert not build_optimizer(model, OptimConfig(fused=False)).param_groups[0]["fused"]


def test_counts_of_steps_come_to_their_parameters() -> None:
    """As a fused step needs them, where a state comes from a step that kept them on the host."""
    parameter = nn.Parameter(torch.empty(2, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.state[parameter] = {"step": torch.tensor(3.0, dtype=torch.float64), "exp_avg": torch.zeros(2)}
    place_counts(optimizer)
    count = optimizer.state[parameter]["step"]
    assert (count.device.type, count.dtype) == ("meta", torch.float32)


def steps(count: int, seed: int = 0) -> list[tuple[float, float]]:
    """(loss, gradient norm) of an uneventful run: falling loss, noise in both."""
    noise = random.Random(seed)
    return [
        (2 + 6 * math.exp(-step / 50) + noise.gauss(0, 0.05), math.exp(noise.gauss(0, 0.3)))
        for step in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_an_uneventful_run_skips_nothing(seed: int) -> None:
    guard = SpikeGuard(SpikeGuardConfig(window=32))
    assert not any(guard.should_skip(*step) for step in steps(400, seed))
    assert guard.skipped == 0


def test_spikes_of_loss_and_of_gradient_are_skipped_and_forgotten() -> None:
    guard = SpikeGuard(SpikeGuardConfig(window=32))
    usual = steps(200)
    for step in usual[:150]:
        guard.should_skip(*step)
    assert guard.should_skip(usual[150][0] + 3, 1.0)
    assert "the loss" in guard.reason
    assert guard.should_skip(usual[150][0], 1000.0)
    assert "the gradient norm 1000" in guard.reason
    assert not any(guard.should_skip(*step) for step in usual[150:])
    assert (guard.skipped, guard.reason) == (2, "")


def test_a_fall_is_never_a_spike() -> None:
    guard = SpikeGuard(SpikeGuardConfig(window=4))
    for _ in range(4):
        guard.should_skip(5.0, 1.0)
    assert not guard.should_skip(0.1, 1e-9)
    assert not guard.should_skip(0.1, 0.0)


def test_no_spike_is_seen_before_the_window_is_full_but_nan_always_is() -> None:
    guard = SpikeGuard(SpikeGuardConfig(window=8))
    for index in range(8):
        assert not guard.should_skip(1000.0 if index == 7 else 1.0, 1e6 if index == 7 else 1.0)
        assert guard.should_skip(math.nan)
        assert guard.should_skip(1.0, math.inf)
    assert guard.should_skip(2.0, 1.0)
    assert guard.skipped == 17


def test_disabled_it_still_refuses_what_is_not_a_number() -> None:
    guard = SpikeGuard(SpikeGuardConfig(enabled=False, window=2))
    assert not any(guard.should_skip(loss) for loss in [1.0, 1.0, 1.0, 1e9])
    assert guard.should_skip(math.inf)


def test_it_gives_up_after_its_patience() -> None:
    guard = SpikeGuard(SpikeGuardConfig(patience=3))
    for _ in range(2):
        assert guard.should_skip(math.nan)
    assert not guard.should_skip(1.0)
    for _ in range(2):
        assert guard.should_skip(math.nan)
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row .*the loss is nan"):
        guard.should_skip(math.nan)


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(
        st.tuples(st.sampled_from([1.0, 1.1, 0.9, 9.0, math.nan]), st.sampled_from([1.0, 2.0, 500.0])),
        max_size=40,
    ),
    cut=st.integers(0, 40),
)
def test_resume_decides_as_if_never_stopped(values: list[tuple[float, float]], cut: int) -> None:
    config = SpikeGuardConfig(window=5, patience=1000)
    straight = SpikeGuard(config)
    expected = [straight.should_skip(*value) for value in values]
    first = SpikeGuard(config)
    decisions = [first.should_skip(*value) for value in values[:cut]]
    resumed = SpikeGuard(config)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    decisions += [resumed.should_skip(*value) for value in values[cut:]]
    assert decisions == expected
    assert resumed.state_dict() == straight.state_dict()


@pytest.mark.parametrize("values", [{"window": 1}, {"threshold": 0.0}, {"patience": 0}])
def test_bad_guard_values_name_their_key(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"spike_guard.{next(iter(values))}"):
        SpikeGuardConfig(**values)  # type: ignore[arg-type]
