"""What is kept, on its way to the host and back: exact values, and the order of copies and waits.

The stand-in for streams copies nothing before somebody waits: what is read too early is not a number, and a
source that was let go too early is gone.
"""

import contextlib
import gc
import weakref

import pytest
import torch

from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.training.step import offload
from dualroute.training.step.activations import keep_fewer_activations
from dualroute.training.step.offload import Offload, PlainCopies, StreamCopies


class LateCopies:
    """Does a copy when it is waited for, and keeps a record."""

    def __init__(self):
        self.record = []
        self.alive = weakref.WeakSet()  # what was fetched and is still held
        self.most = 0

    def start(self, source, *, to_host):
        target = torch.full_like(source, float("nan")) if source.is_floating_point() else ~source
        ticket = [weakref.ref(source), target, to_host]
        self.record.append(("start", "out" if to_host else "back"))
        if not to_host:
            self.alive.add(target)
            self.most = max(self.most, len(self.alive))
        return target, ticket

    def wait(self, ticket):
        source, target, to_host = ticket
        if source is None:
            return
        assert source() is not None, "the source was let go before its copy"
        target.copy_(source())
        ticket[0] = None
        self.record.append(("done", "out" if to_host else "back"))


def model(layers=4, what="none", traffic=None):
    torch.manual_seed(3)
    built = DualRoutingTransformer(
        ModelConfig(vocab_size=50, dim=32, num_layers=layers, num_heads=4, window=8, block=16, top_k=2,
                    global_mode="routed", max_context=128)
    )  # fmt: skip
    keep_fewer_activations(built, what, offload=traffic if traffic is not None else False)
    return built


IDS = torch.randint(50, (2, 128), generator=torch.Generator().manual_seed(1))


def gradients(built, times=1):
    losses = [built(IDS).logsumexp(-1).sum() for _ in range(times)]
    for loss in reversed(losses):
        loss.backward()
    return [parameter.grad.clone() for parameter in built.parameters()]


def assert_equal(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("what", ["none", "full", "feed_forward"])
@pytest.mark.parametrize("copies", [PlainCopies, LateCopies])
def test_gradients_are_those_of_the_plain_model_to_the_bit(what, copies):
    used = copies()
    assert_equal(
        gradients(model(what=what, traffic=Offload(used, least_bytes=0))), gradients(model(what=what))
    )


def test_two_forward_passes_before_their_backward_passes():
    assert_equal(gradients(model(traffic=Offload(LateCopies(), least_bytes=0)), 2), gradients(model(), 2))


def test_a_graph_that_is_read_twice_is_fetched_twice():
    built = model(traffic=Offload(LateCopies(), least_bytes=0))
    loss = built(IDS).logsumexp(-1).sum()
    first = torch.autograd.grad(loss, list(built.parameters()), retain_graph=True)
    assert_equal(first, torch.autograd.grad(loss, list(built.parameters())))


def test_copies_go_beside_the_computation_and_little_is_on_the_device_at_once():
    copies = LateCopies()
    traffic = Offload(copies, least_bytes=0)
    built = model(layers=5, what="full", traffic=traffic)  # each layer keeps its input, and little else
    per_layer = []
    for layer in built.layers:
        layer.register_forward_hook(lambda *_: per_layer.append(list(copies.record)))
    loss = built(IDS).logsumexp(-1).sum()
    starts = [record.count(("start", "out")) for record in per_layer]
    done = [record.count(("done", "out")) for record in per_layer]
    assert starts[0] > 0
    assert done[0] == done[1] == 0, "nobody waits for a layer's copies before the next layer has run"
    assert done[2] == starts[0]
    assert done[3] == starts[1]
    assert starts[4] == starts[3], "the last layer stays"
    before = len(copies.record)
    loss.backward()
    backward = [event for event in copies.record[before:] if event[1] == "back"]
    first_wait = backward.index(("done", "back"))
    assert first_wait >= 2 * starts[0], "two layers are on their way before the first is waited for"
    assert copies.most <= 2 * starts[0]
    assert len(backward) == 2 * starts[3], "each was fetched once"


def test_weights_and_small_tensors_are_not_moved():
    copies = LateCopies()
    layer = torch.nn.Linear(64, 64)
    moved = Offload(copies, least_bytes=4 * 64 * 64 + 1).around(layer.forward, layer)
    moved(torch.randn(64, 64, requires_grad=True)).sum().backward()
    assert copies.record == []
    moved = Offload(copies, least_bytes=0).around(layer.forward, layer)
    moved(torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert copies.record.count(("start", "out")) == 1  # the input, and not the weight


def test_a_weight_is_read_where_it_lies_in_the_backward_pass():
    """As under ZeRO-3, which frees it after the forward pass and gathers it anew elsewhere."""
    layer = torch.nn.Linear(8, 8, bias=False)
    rows = torch.randn(3, 8, requires_grad=True)
    result = Offload(PlainCopies(), least_bytes=0).around(layer.forward, layer)(rows)
    values = layer.weight.detach().clone()
    storage = weakref.ref(layer.weight.data.untyped_storage())
    layer.weight.data = torch.empty(0)
    gc.collect()
    assert storage() is None
    layer.weight.data = torch.cat([torch.zeros(8), values.flatten()])[8:].view(8, 8)
    result.sum().backward()
    torch.testing.assert_close(rows.grad, torch.ones(3, 8) @ values)


def test_nothing_outlives_its_graph():
    copies = LateCopies()
    built = model(traffic=Offload(copies, least_bytes=0))
    built(IDS).logsumexp(-1).sum().backward()
    gc.collect()
    assert not copies.alive
    loss = built(IDS).logsumexp(-1).sum()
    loss.backward()
    assert not copies.alive


def test_a_change_in_place_is_named():
    layer = torch.nn.Linear(8, 8)
    moved = Offload(LateCopies(), least_bytes=0).around(layer.forward, layer)
    rows = torch.randn(4, 8, requires_grad=True).clone()
    moved(rows)
    rows.mul_(2)
    moved(torch.randn(4, 8))
    with pytest.raises(RuntimeError, match="changed in place"):
        moved(torch.randn(4, 8))


class FakeStream:
    """Of ``torch.cuda``: says what is asked of it."""

    def __init__(self, name, record):
        self.name, self.record = name, record

    def wait_stream(self, other):
        self.record.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.record.append(f"{self.name} is marked")
        return f"mark of {self.name}"

    def wait_event(self, event):
        self.record.append(f"{self.name} waits for {event}")


def test_streams_wait_for_each_other_in_the_right_order(monkeypatch):
    record, names = [], iter(["out", "back"])
    main = FakeStream("main", record)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(next(names), record))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)

    @contextlib.contextmanager
    def on(stream):
        record.append(f"on {stream.name}")
        yield
        record.append("on main")

    monkeypatch.setattr(torch.cuda, "stream", on)
    empty_like = torch.empty_like

    def empty(source, *, device, pin_memory):
        record.append(f"new on {device}, pinned {pin_memory}")
        return empty_like(source)

    monkeypatch.setattr(offload.torch, "empty_like", empty)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: record.append(f"for {stream.name}")
    )
    copies = StreamCopies(torch.device("cuda"))
    source = torch.randn(3)
    host, ticket = copies.start(source, to_host=True)
    copies.wait(ticket)
    again, ticket = copies.start(host, to_host=False)
    copies.wait(ticket)
    assert torch.equal(again, source)
    assert record == [
        *("new on cpu, pinned True", "out waits for main", "on out", "out is marked", "on main"),
        "main waits for mark of out",
        *("new on cuda, pinned False", "back waits for main", "on back", "back is marked", "on main"),
        *("for back", "main waits for mark of back"),
    ]
