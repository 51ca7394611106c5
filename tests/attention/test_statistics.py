"""The numbers for the monitor: shares that sum to 1 and agree with the explicit mask."""

from __future__ import annotations

import pytest
import torch

from dualroute.attention import Layout, Routing, reference, statistics
from dualroute.attention.statistics import routing_statistics
from tests.attention.helpers import ORDERS, ROUTERS, batches, heads, to_stream
from tests.attention.test_layer import layer, states

SHARES = ("mass_own", "mass_sink", "mass_selected", "mass_far")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mode", ["routed", "full", "auto"])
@pytest.mark.parametrize("name", batches())
def test_shares_sum_to_one_and_change_nothing(name: str, mode: str, causal: bool) -> None:
    layout = batches()[name]
    module, hidden = layer(global_mode=mode, causal=causal, num_kv_heads=2), states(2, layout.length)
    plain = module(hidden, layout=layout)
    assert module.statistics == {}
    module.collect_statistics = True
    assert torch.equal(module(hidden, layout=layout), plain)
    found = module.statistics
    assert set(found) == {*SHARES, "router_entropy", "gate_global", "gate_local"}
    assert all(value.ndim == 0 and 0 <= float(value) <= 1.000001 for value in found.values())
    assert sum(float(found[share]) for share in SHARES) == pytest.approx(1, abs=1e-5)
    assert float(found["gate_global"]) == float(found["gate_local"]) == 1


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("order", [*ORDERS, "full"])
def test_shares_are_those_of_the_explicit_mask(order: str, router: str) -> None:
    """Values that are 1 in one kind of block and 0 elsewhere make the reference's output the share itself."""
    layout = Layout.build(1, 72, 8)
    query, key, _ = (rows.detach() for rows in heads(1, 72))
    routing = Routing(2, router, order if order != "full" else "none", 4)
    found = routing_statistics(
        *(to_stream(layout, rows).float() for rows in (query, key, key)),
        layout.stream,
        routing,
        max_exact_blocks=None if order == "full" else 0,
        causal=True,
    )
    ones = torch.zeros(2, 72, 9, dtype=torch.float64)
    ones[:, torch.arange(72), torch.arange(72) // 8] = 1  # value = one-hot number of the block
    if order == "full":
        weight = reference.full(query[0], key[0], ones)
    else:
        weight = reference.routed(
            query[0], key[0], ones, block=8, top_k=2, router=router, far_summary=order, sub_block=4
        )
    own = torch.arange(9) == torch.arange(72)[:, None] // 8
    sink = (torch.arange(9) == 0) & ~own
    selected = reference.select(query[0], key[0], block=8, top_k=2, router=router, sub_block=4)
    selected = selected.repeat_interleave(2, 0)
    for share, where in (("own", own), ("sink", sink), ("selected", selected)):
        assert float(found[f"mass_{share}"]) == pytest.approx(
            float((weight * where).sum(-1).mean()), abs=1e-5
        )


def test_entropy_tells_one_block_from_all_of_them() -> None:
    layout = Layout.build(1, 128, 8)
    query, key, _ = (rows[0].detach().float() for rows in heads(1, 128, 1, 1))
    routing = Routing(1, "mean", "none")
    options = {"max_exact_blocks": None, "causal": False}
    spread = routing_statistics(query, key, key, layout.stream, routing, **options)["router_entropy"]
    query, key = torch.ones_like(query), key * 0
    key[:, 40:48] = 5
    single = routing_statistics(query, key, key, layout.stream, routing, **options)["router_entropy"]
    assert float(spread) > 0.7
    assert float(single) < 0.3


def test_a_long_stream_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.build(1, 800, 8)
    rows = [to_stream(layout, part.detach().float()) for part in heads(1, 800)]
    assert len(statistics._sample(layout.stream, 4)) == statistics.MAX_ROWS
    monkeypatch.setattr(statistics, "MAX_LOGITS", 800 * 4 * 10)
    assert len(statistics._sample(layout.stream, 4)) == 10
    found = routing_statistics(*rows, layout.stream, Routing(2, sub_block=4), max_exact_blocks=3, causal=True)
    assert sum(float(found[share]) for share in SHARES) == pytest.approx(1, abs=1e-5)


def test_the_mean_gates_of_each_route() -> None:
    module, hidden = layer(gate=True), states(2, 30)
    module.collect_statistics = True
    module.gate_weight.data[:2] = 0
    module.gate_weight.data[2:].normal_()
    module(hidden)
    assert float(module.statistics["gate_global"]) == 1
    wanted = (2 * torch.sigmoid(hidden @ module.gate_weight[2:].T)).mean()
    torch.testing.assert_close(module.statistics["gate_local"].double(), wanted.detach(), rtol=1e-5, atol=0)
    only_local = layer(global_heads=0)
    only_local.collect_statistics = True
    only_local(hidden)
    assert set(only_local.statistics) == {"gate_global", "gate_local"}


def test_the_map_is_the_mass_of_blocks_of_the_longest_document(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = torch.tensor([[1] * 20 + [2] * 44])
    layout = Layout.build(1, 64, 8, segment_ids=segments)
    query, key, _ = (rows.detach() for rows in heads(1, 64))
    rows = [to_stream(layout, part).float() for part in (query, key, key)]
    how = {"max_exact_blocks": 0, "causal": True, "block_map": True}
    found = routing_statistics(*rows, layout.stream, Routing(1, sub_block=4), **how)["block_map"]
    ones = torch.zeros(2, 44, 6, dtype=torch.float64)
    ones[:, torch.arange(44), torch.arange(44) // 8] = 1
    weight = reference.routed(query[0][:, 20:], key[0][:, 20:], ones, block=8, top_k=1, sub_block=4).mean(0)
    expected = torch.stack([part.mean(0) for part in weight.split(8)])
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=0)
    monkeypatch.setattr("dualroute.attention.statistics.MAX_BINS", 3)
    coarse = routing_statistics(*rows, layout.stream, Routing(1, sub_block=4), **how)["block_map"]
    pairs = torch.stack([part.mean(0) for part in weight.split(16)]).unflatten(-1, (3, 2)).sum(-1)
    torch.testing.assert_close(coarse, pairs.float(), atol=1e-4, rtol=0)
    module = layer(global_mode="routed")
    module.collect_statistics = module.collect_map = True
    module(states(1, 64), layout=layout)
    assert module.statistics["block_map"].shape == (3, 3)
    module.collect_map = False
    module(states(1, 64), layout=layout)
    assert "block_map" not in module.statistics
