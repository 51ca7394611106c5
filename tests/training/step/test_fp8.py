"""fp8 on a CPU, where torchao emulates it: the losses of bf16-mixed, and checkpoints like its own."""

import importlib.util
import sys

import pytest
import torch
from torch import nn

from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint_format import find_checkpoint, load_model
from dualroute.training.config import DataConfig, ParallelConfig, PretrainConfig, TrainConfig
from dualroute.training.step.fp8 import check_fp8, multiply_in_fp8
from tests.training.step.test_module import curve, train

pytest.importorskip("torchao")


def config(**train):
    return PretrainConfig(data=DataConfig(context=64), train=TrainConfig(precision="fp8", **train))


def model(**changes):
    torch.manual_seed(0)
    shape = {"dim": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 50, "max_context": 64, "block": 16}
    return DualRoutingTransformer(ModelConfig(**{**shape, **changes}))


def test_linear_layers_multiply_in_fp8_and_nothing_else_changes():
    plain, made = model(ffn_dim=72), model(ffn_dim=72)
    before = {name: p.data_ptr() for name, p in made.named_parameters()}
    multiply_in_fp8(made)
    assert {name: p.data_ptr() for name, p in made.named_parameters()} == before
    kinds = {name: type(m).__name__ for name, m in made.named_modules() if isinstance(m, nn.Linear)}
    assert kinds == {
        "layers.0.attention.global_qkv": "Float8Linear",
        "layers.0.attention.local_qkv": "Float8Linear",
        "layers.0.attention.out_proj": "Float8Linear",
        # 72 is no multiple of 16
        **dict.fromkeys(("layers.0.ffn.gate", "layers.0.ffn.up", "layers.0.ffn.down"), "Linear"),
    }
    rows = torch.randn(4, 32)
    projections = [each.layers[0].attention.global_qkv for each in (made, plain)]
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (projection(rows) for projection in projections)
    assert found.dtype == wanted.dtype == torch.bfloat16
    error = float((found - wanted).detach().norm() / wanted.detach().norm())
    assert 0.01 < error < 0.06  # three bits after the point of either factor


def test_a_model_without_fitting_layers_is_refused():
    with pytest.raises(UserError, match=r"sizes are multiples of 16, and the model has none"):
        multiply_in_fp8(model(dim=24, num_heads=4, head_dim=6, ffn_dim=72))


def test_without_torchao_the_remedy_is_said(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name))
    with pytest.raises(UserError, match=r"train.precision fp8 needs torchao: pip install -e '.\[compress\]'"):
        check_fp8(config())


@pytest.mark.parametrize(("capability", "refused"), [((8, 6), True), ((8, 9), False), ((10, 0), False)])
def test_gpus_without_fp8_are_refused_by_name(capability, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A40")
    if not refused:
        check_fp8(config())
        return
    with pytest.raises(UserError, match=r"capability 8.9 or more and A40 has 8.6: use bf16-mixed"):
        check_fp8(config())


def test_settings_that_stand_against_it_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data.context 60 x train.micro_batch 1 gives 60"):
        check_fp8(
            PretrainConfig(data=DataConfig(context=60), train=TrainConfig(precision="fp8", micro_batch=1))
        )
    with pytest.raises(UserError, match=r"cannot be used with train.quantization_aware"):
        check_fp8(config(quantization_aware="int8_weight_only"))
    (tmp_path / "ds.yaml").write_text("zero_optimization: {stage: 3}")
    for parallel in (
        ParallelConfig(zero_stage=3),
        ParallelConfig(deepspeed_config=str(tmp_path / "ds.yaml")),
    ):
        other = config()
        other.parallel = parallel
        with pytest.raises(UserError, match=r"cannot be used with parallel.zero_stage 3"):
            check_fp8(other)


def losses(precision, steps=200):
    """Of a tiny model that learns which token follows which; the noise in the text keeps them from 0."""
    made = model(num_layers=2, vocab_size=64, window=16, global_mode="routed", top_k=1)
    if precision == "fp8":
        multiply_in_fp8(made)
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    follower = torch.randperm(64, generator=generator)
    found = []
    for _ in range(steps):
        ids = torch.randint(64, (4, 65), generator=generator)
        for place in range(1, 65):
            known = torch.rand(4, generator=generator) < 0.8
            ids[:, place] = torch.where(known, follower[ids[:, place - 1]], ids[:, place])
        with torch.autocast("cpu", torch.bfloat16):
            logits = made(ids[:, :-1]).flatten(0, 1).float()
        loss = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.slow
def test_losses_are_within_one_per_cent_of_bf16_over_200_steps():
    ours, theirs = losses("fp8"), losses("bf16-mixed")
    assert ours != theirs
    assert theirs[-1] < 0.6 * theirs[0]  # it has learnt something
    assert max(abs(mine / other - 1) for mine, other in zip(ours, theirs, strict=True)) < 0.01


@pytest.mark.slow
def test_its_checkpoints_are_those_of_bf16_and_need_no_torchao(tiny_dataset, tmp_path, monkeypatch):
    few = ("--train.micro_batch", "8", "--optim.warmup_steps", "1", "--monitor.sample_every_steps", "0")
    for precision in ("bf16-mixed", "fp8"):
        train(tiny_dataset, tmp_path / precision, 4, *few, "--train.precision", precision)
    assert "precision: fp8" in (tmp_path / "fp8" / "config.yaml").read_text()
    monkeypatch.setitem(sys.modules, "torchao", None)  # importing it fails
    found, wanted = (load_model(find_checkpoint(tmp_path / name)) for name in ("fp8", "bf16-mixed"))
    types = [{name: (p.shape, p.dtype) for name, p in each.named_parameters()} for each in (found, wanted)]
    assert types[0] == types[1]
    # the state, too, is one of bf16-mixed: either way a run goes on from the other's
    for name, precision in (("fp8", "bf16-mixed"), ("bf16-mixed", "fp8")):
        train(tiny_dataset, tmp_path / name, 6, *few, "--train.precision", precision)
        assert set(curve(tmp_path / name)) == set(range(1, 7))
