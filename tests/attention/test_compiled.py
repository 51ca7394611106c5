"""The layer as one graph: equal to the plain one whatever the lengths, packings and back ends."""

import gc
import shutil
import weakref

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from dualroute.attention import DualRouting, Layout
from dualroute.attention.compiled import Tape, global_route
from dualroute.attention.core.held import held, hold

OPTIONS = {
    "full": {"global_mode": "full"},
    "routed": {"global_mode": "routed", "global_rotary_factor": 0.0, "cluster_span": 16},
    # short documents in full, long ones routed; each route has another rotary table
    "dual": {"global_mode": "auto", "auto_break_even": 32, "global_rotary_factor": 0.5},
    "local": {"global_heads": 0, "local_heads": 4},
    "both ways": {"global_mode": "routed", "causal": False},
}
LENGTH = 64


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()
    counters.clear()


def layer(name):
    torch.manual_seed(0)
    shape = {"num_kv_heads": 2, "window": 8, "block": 8, "sub_block": 4, "top_k": 1}
    made = DualRouting(32, 4, **shape, **OPTIONS[name], qk_norm=True, gate=True)
    torch.nn.init.normal_(made.gate_weight)
    return made


def packed(length, *cuts):
    segments = torch.ones(2, length, dtype=torch.long)
    for cut in cuts:
        segments[:, cut:] += 1
    segments[1, : length // 2] = 9  # another packing in the other row
    return segments


def results(function, layer, hidden, **inputs):
    """Output and all gradients."""
    layer.zero_grad()
    hidden = hidden.clone().requires_grad_()
    out = function(hidden, **inputs)
    (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    return [out.detach(), hidden.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


def assert_equal(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * float(other.abs().max().clamp_min(1e-3)))


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("full", "torch"),
        pytest.param("dual", "cpp", marks=pytest.mark.slow),
        *(pytest.param(name, "torch", marks=pytest.mark.slow) for name in ("routed", "local", "both ways")),
    ],
)
def test_a_compiled_layer_is_one_graph_and_equal(name, kernels, monkeypatch):
    monkeypatch.setenv("DUALROUTE_KERNELS", kernels)
    plain = layer(name)
    program = torch.compile(plain, backend="aot_eager", fullgraph=True)
    hidden = torch.randn(2, LENGTH, 32)
    for segments in (None, packed(LENGTH, 20)):
        layout = Layout.build(2, LENGTH, 8, segment_ids=segments)
        plain.prepare(layout, torch.float32)
        assert_equal(*(results(f, plain, hidden, layout=layout) for f in (program, plain)))
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_lengths_and_packings_share_a_program():
    plain = layer("dual")
    program = torch.compile(plain, backend="aot_eager", fullgraph=True)
    for length, cuts in ((64, (20,)), (64, (9,)), (96, (50,)), (128, (3,)), (72, (30, 40, 50))):
        hidden = torch.randn(2, length, 32)
        layout = Layout.build(2, length, 8, segment_ids=packed(length, *cuts))
        assert_equal(*(results(f, plain, hidden, layout=layout) for f in (program, plain)))
    # one for the first sizes, one for any number of slots, one for any length: never one more for each
    assert counters["stats"]["unique_graphs"] <= 3


@pytest.mark.slow
def test_the_layout_is_made_in_the_graph_where_none_is_given():
    plain = layer("dual")
    program = torch.compile(plain, backend="aot_eager", fullgraph=True)
    hidden = torch.randn(2, LENGTH, 32)
    for inputs in (
        {},
        {"segment_ids": packed(LENGTH, 20)},
        {"segment_ids": packed(LENGTH, 33), "positions": torch.arange(LENGTH).expand(2, -1)},
        {"attention_mask": torch.arange(LENGTH).expand(2, -1) < 50},
    ):
        assert_equal(*(results(f, plain, hidden, **inputs) for f in (program, plain)))
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_generated_code_gives_the_same():
    plain = layer("dual")
    program = torch.compile(plain, fullgraph=True, dynamic=True)  # one for all lengths, and not one more each
    for length, cuts in ((64, (20,)), (96, (50,))):
        hidden = torch.randn(2, length, 32)
        segments = packed(length, *cuts)
        inputs = {"layout": Layout.build(2, length, 8, segment_ids=segments)}
        assert_equal(*(results(f, plain, hidden, **inputs) for f in (program, plain)))
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_generated_code_makes_the_layout_too():
    plain = layer("dual")
    program = torch.compile(plain, fullgraph=True)
    hidden, segments = torch.randn(2, 72, 32), packed(72, 30)
    assert_equal(*(results(f, plain, hidden, segment_ids=segments) for f in (program, plain)))
    assert not counters["graph_break"]


def test_the_operators_keep_torch_s_rules():
    """Fake results like the real ones, gradients registered, nothing written to, also with changing sizes."""
    layout = Layout.build(1, 24, 8)
    rows = [torch.randn(heads, 24, 8, requires_grad=True) for heads in (4, 2, 2)]
    settings = (1, "minmax", "second_order", 4, 0, 2, True, True)
    arguments = (*rows, layout.handle, *settings)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(global_route, arguments, test_utils=utils)


def test_a_tape_keeps_neither_its_inputs_nor_its_result():
    kept = []

    def record(query, key, value):
        logits = query @ key.transpose(-1, -2)
        weights = logits.softmax(-1)
        kept.append(weakref.ref(weights.untyped_storage()))
        return weights @ value

    rows = [torch.randn(2, 6, 4) for _ in range(3)]
    leaves = [row.clone().requires_grad_() for row in rows]
    wanted = record(*leaves)
    grad = torch.randn_like(wanted)
    to_leaves = torch.autograd.grad(wanted, leaves, grad)

    with torch._C._AutoDispatchBelowAutograd(), torch.no_grad():
        out, tape = Tape.record(record, *rows)
        assert torch.equal(out, wanted)
        again = [row.clone() for row in (*rows, out)]
        for row in (*rows, out):
            row.fill_(torch.nan)  # whoever owns the memory uses it for something else
        for one, other in zip(tape.backward(grad, *again), to_leaves, strict=True):
            torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        tape.backward(grad, *again)


@pytest.mark.slow
def test_what_a_route_has_kept_is_gone_after_the_backward_pass_and_with_the_graph():
    plain = layer("routed")
    program = torch.compile(plain, backend="aot_eager", fullgraph=True)
    layout = Layout.build(2, LENGTH, 8)
    hidden = torch.randn(2, LENGTH, 32)

    def tapes():
        gc.collect()
        return sum(isinstance(thing, Tape) for thing in gc.get_objects())

    program(hidden.requires_grad_(), layout=layout)
    assert tapes() == 0  # the graph was dropped
    out = program(hidden, layout=layout)
    assert tapes() == 2
    out.sum().backward()
    del out
    assert tapes() == 0
    with torch.no_grad():
        kept = program(hidden, layout=layout)
    assert kept.shape == hidden.shape
    assert tapes() == 0


def test_a_handle_of_another_process_is_refused():
    with pytest.raises(ValueError, match="in the process that made it"):
        held(torch.tensor([12345678]))
    assert held(hold("here")) == "here"
