"""Compiled layers: the same losses and gradients, one program for all layers, nothing else changed."""

import shutil

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from dualroute.model import DualRoutingTransformer, ModelConfig, SamplingConfig, generate
from dualroute.training.step.activations import keep_fewer_activations
from dualroute.training.step.compilation import compile_layers
from dualroute.training.step.quantization_aware import round_weights_in_forward

SHAPE = dict(
    dim=32, num_layers=3, num_heads=4, num_kv_heads=2, vocab_size=64, max_context=96, window=8, block=8,
    sub_block=4, top_k=1, qk_norm=True, gate=True, global_mode="auto", auto_break_even=32,
)  # fmt: skip


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()
    counters.clear()


def model(**changes):
    torch.manual_seed(0)
    return DualRoutingTransformer(ModelConfig(**{**SHAPE, **changes}))


def batch(length=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(64, (2, length), generator=generator)
    cuts = torch.rand(2, length, generator=generator) < 0.05
    segments = 1 + cuts.cumsum(1)
    segments[:, -3:] = 0  # padding
    positions = torch.arange(length).expand(2, -1) % 40
    return {"input_ids": ids, "segment_ids": segments, "positions": positions}


def loss_and_gradients(model, inputs):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=model.half):
        logits = model(**inputs).float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"].flatten())
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("activations", ["none", "full", "feed_forward"])
def test_losses_and_gradients_are_those_of_eager_layers(activations, half):
    plain, compiled = model(), model()
    plain.half = compiled.half = half
    keys = list(compiled.state_dict())
    compile_layers(compiled, "aot_eager")
    keep_fewer_activations(compiled, activations)
    for seed in range(3):  # three packings, the last two of them by one program
        got, want = (loss_and_gradients(each, batch(seed=seed)) for each in (compiled, plain))
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=(0.02 if half else 1e-5) * float(other.abs().max()))
    assert list(compiled.state_dict()) == keys
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 2
