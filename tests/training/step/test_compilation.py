"""Compiled layers: the same losses and gradients, one program for all layers, nothing else changed."""

import json

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from dualroute.model import DualRoutingTransformer, ModelConfig, SamplingConfig, generate
from dualroute.model.checkpoint.format import find_checkpoint
from dualroute.training.monitoring.metrics_log import read_metrics
from dualroute.training.step.activations import keep_fewer_activations
from dualroute.training.step.compilation import compile_layers
from dualroute.training.step.offload import Offload
from dualroute.training.step.quantization_aware import round_weights_in_forward
from tests import warm
from tests.conftest import ROOT
from tests.training.step.test_module import SMALL, curve, environment
from tests.training.step.test_offload import LateCopies

SHAPE = {
    "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 64, "max_context": 96,
    "window": 8, "block": 8, "sub_block": 4, "top_k": 1, "qk_norm": True, "gate": True, "global_mode": "auto",
    "auto_break_even": 32,
}  # fmt: skip


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


def loss_and_gradients(model, inputs, half=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = model(**inputs).float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"].flatten())
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activations", "half"), [("none", False), ("full", True), ("feed_forward", False), ("full", False)]
)
def test_losses_and_gradients_are_those_of_eager_layers(activations, half):
    plain, compiled = model(), model()
    keys = list(compiled.state_dict())
    compile_layers(compiled, "aot_eager")
    keep_fewer_activations(compiled, activations)
    for seed in range(3):  # three packings, by one program
        got, want = (loss_and_gradients(each, batch(seed=seed), half) for each in (compiled, plain))
        for one, other in zip(got, want, strict=True):
            most = (0.02 if half else 1e-5) * float(other.abs().max())
            torch.testing.assert_close(one, other, rtol=0, atol=most)
    assert list(compiled.state_dict()) == keys
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_what_asks_the_host_for_numbers_goes_the_plain_way():
    """Decoding and the router's statistics, from the same layers."""
    plain, compiled = model().eval(), model().eval()
    compile_layers(compiled, "aot_eager")
    sampling = SamplingConfig(max_new_tokens=8, temperature=0)
    texts = [list(generate(each, [1, 2, 3], sampling)) for each in (compiled, plain)]
    assert texts[0] == texts[1]
    statistics = []
    for each in (compiled, plain):
        for block in each.layers:
            block.attention.collect_statistics = True
        with torch.no_grad():
            each(**batch())
        statistics.append([block.attention.statistics for block in each.layers])
    assert statistics[0] == statistics[1]
    assert "router_entropy" in statistics[0][0]
    assert not counters["stats"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["none", "full", "feed_forward"])
def test_what_compiled_layers_keep_may_be_moved_to_the_host(what):
    """And comes back as it went: the same program, gradients equal to the bit."""
    compiled, moved = model(), model()
    copies = LateCopies()
    for each, traffic in ((compiled, False), (moved, Offload(copies, least_bytes=256))):
        compile_layers(each, "aot_eager")
        keep_fewer_activations(each, what, offload=traffic)
    for seed in range(2):
        found, wanted = (loss_and_gradients(each, batch(seed=seed)) for each in (moved, compiled))
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert copies.record.count(("start", "out")) == copies.record.count(("start", "back")) > 0
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_rounded_weights_are_rounded_in_compiled_layers_too():
    plain, compiled = model(), model()
    for each in (plain, compiled):
        round_weights_in_forward(each, "int8_weight_only", 32)
    compile_layers(compiled, "aot_eager")
    got, want = (loss_and_gradients(each, batch()) for each in (compiled, plain))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


RUN = (
    "--data.val_tokens 256 --train.tokens_per_batch 256 --train.val_every_steps 3 "
    "--optim.lr 0.003 --optim.schedule constant --optim.warmup_steps 1 --checkpoint.every_steps 3 "
    "--monitor.sample_every_steps 6 --monitor.router_statistics_every 3 --monitor.sample_tokens 4"
).split()
STEPS = 6
WAYS = {
    "ddp": ("--parallel.strategy", "ddp"),
    "shared texts": ("--parallel.strategy", "ddp", "--parallel.sequence_parallel", "2"),
    "zero1, fp8": ("--parallel.zero_stage", "1", "--train.precision", "fp8"),
    "zero2, recomputed": ("--parallel.zero_stage", "2", "--train.activation_checkpointing", "full"),
}
PLAIN = ("ddp", "zero1, fp8")  # the former's losses are those of all ways that compute in float32


@pytest.fixture(scope="module")
def two_ranks(tiny_dataset, tmp_path_factory):
    """By way: a run with compiled layers, which stopped and went on at ZeRO-2; and those without."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("two ranks")
    legs = []
    for name, more in WAYS.items():
        legs_of_way = [("compiled", "true", STEPS)]
        if name in PLAIN:
            legs_of_way.insert(0, ("plain", "false", STEPS))
        if "zero2" in name:
            legs_of_way.insert(0, ("compiled", "true", STEPS // 2))
        for kind, compiled, steps in legs_of_way:
            own = ("--output", str(folder / name / kind), "--data.path", str(tiny_dataset))
            own += ("--train.compile", compiled, "--train.max_steps", str(steps))
            legs.append([*SMALL, *RUN, *own, *more])
    (folder / "runs.json").write_text(json.dumps(legs))
    words = [str(folder / "runs.json")]
    warm.ranks(2, "tests/training/step/processes/compiled_runs.py", words, cwd=ROOT, env=environment())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_ranks_train_compiled_layers_as_plain_ones_and_resume(two_ranks, way):
    plain, compiled = two_ranks / PLAIN["fp8" in way] / "plain", two_ranks / way / "compiled"
    assert curve(plain).keys() == curve(compiled).keys() == set(range(1, STEPS + 1))
    for event in ("train", "validation"):
        want = curve(plain, event)
        # a sum that is rounded otherwise is now and then another number of eight bits
        assert curve(compiled, event) == pytest.approx(want, abs=1e-2 if "fp8" in way else 1e-4)
    names = [
        sorted(load_file(find_checkpoint(run).folder / "model.safetensors")) for run in (plain, compiled)
    ]
    assert names[0] == names[1]
    router = [read_metrics(run / "metrics.jsonl", "router") for run in (plain, compiled)]
    assert [sorted(line) for line in router[0]] == [sorted(line) for line in router[1]]
    assert router[0]
