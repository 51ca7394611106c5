"""Routed attention through flash attention's operators: values and gradients against the specification."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from dualroute.attention import Layout, Routing, reference
from dualroute.attention.backends import torch as plain
from dualroute.attention.backends.flash import pairs, slabs
from dualroute.attention.backends.flash.backend import FlashBackend
from tests.attention.helpers import (
    ORDERS,
    ROUTERS,
    assert_same_with_gradients,
    batches,
    expected,
    heads,
    run,
)

BLOCK = 8
BATCHES = batches(75, BLOCK)


def _routed(
    flash: FlashBackend, layout: Layout, inputs: tuple[Tensor, ...], routing: Routing, causal: bool = True
) -> Tensor:
    def route(query: Tensor, key: Tensor, value: Tensor, stream: object) -> Tensor:
        selected = flash.select_blocks(
            query.detach(),
            key.detach(),
            stream,
            top_k=routing.top_k,
            router=routing.router,
            sub_block=routing.sub_block,
            causal=causal,
        )
        return flash.routed_attention(query, key, value, stream, routing, selected=selected, causal=causal)

    return run(route, layout, inputs)


def _reference(layout: Layout, inputs: tuple[Tensor, ...], routing: Routing, causal: bool) -> Tensor:
    options = {
        "top_k": routing.top_k,
        "router": routing.router,
        "far_summary": routing.far_summary,
        "sub_block": routing.sub_block,
        "causal": causal,
    }
    return expected(lambda q, k, v: reference.routed(q, k, v, block=layout.block, **options), layout, inputs)


def _compare(
    flash: FlashBackend, layout: Layout, inputs: tuple[Tensor, ...], routing: Routing, causal: bool = True
) -> None:
    assert_same_with_gradients(
        _routed(flash, layout, inputs, routing, causal),
        _reference(layout, inputs, routing, causal),
        inputs,
        1e-10,
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("entries", [1 << 29, 700])
@pytest.mark.parametrize("name", sorted(BATCHES))
def test_equals_the_explicit_mask(
    flash: FlashBackend, name: str, entries: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one rectangle, and in several."""
    monkeypatch.setattr(slabs, "max_entries", lambda device: entries)
    layout = batches(75, BLOCK)[name]
    _compare(flash, layout, heads(2, layout.length), Routing(2, sub_block=4), causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_and_summary(flash: FlashBackend, router: str, order: str, causal: bool) -> None:
    layout = BATCHES["packed"]
    _compare(flash, layout, heads(2, 75), Routing(1, router, order, 4), causal)


@pytest.mark.parametrize("top_k", [0, 1, 12])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_any_number_of_blocks_and_heads(flash: FlashBackend, kv_heads: int, top_k: int) -> None:
    for layout in (Layout.build(1, 61, BLOCK), Layout.build(3, 40, BLOCK)):
        _compare(flash, layout, heads(layout.batch, layout.length, 4, kv_heads), Routing(top_k, sub_block=4))


@pytest.mark.parametrize("rows", [1, 6, 64])
def test_where_sequences_are_cut_changes_nothing(
    flash: FlashBackend, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "ROWS", rows)
    layout = batches(75, BLOCK)["packed and padded"]
    _compare(flash, layout, heads(2, 75), Routing(3, sub_block=4))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("order", ["second_order", "none"])
def test_choosing_everything_is_full_attention(flash: FlashBackend, order: str, causal: bool) -> None:
    layout = BATCHES["packed and padded"]
    inputs = heads(2, 75)
    actual = _routed(flash, layout, inputs, Routing(20, "minmax", order, 4), causal)
    full = partial(reference.full, causal=causal)
    assert_same_with_gradients(actual, expected(full, layout, inputs), inputs, 1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_half_precision_is_as_close_as_its_parts(flash: FlashBackend, causal: bool) -> None:
    """Against float64 of the same numbers, with the same choice: parts are rounded once to bfloat16, merges
    are not."""
    layout = Layout.build(1, 512, 32)
    generator = torch.Generator().manual_seed(0)
    low = [torch.randn(h, 512, 32, generator=generator).mul(2).bfloat16() for h in (4, 2, 2)]
    routing = Routing(2, sub_block=16)
    selected = flash.select_blocks(*low[:2], layout.stream, top_k=2, causal=causal)
    cotangent = torch.randn(4, 512, 32, generator=generator).bfloat16()
    results = []
    for route, dtype in ((flash.routed_attention, torch.bfloat16), (plain.routed_attention, torch.float64)):
        inputs = [rows.to(dtype).requires_grad_() for rows in low]
        out = route(*inputs, layout.stream, routing, selected=selected, causal=causal)
        results.append([out, *torch.autograd.grad(out, inputs, cotangent.to(dtype))])
    for name, ours, exact in zip(("out", "query", "key", "value"), *results, strict=True):
        error = (ours.double() - exact).norm() / exact.norm()
        assert error < 0.01, (name, float(error))


def test_twice_the_same_gives_the_same_bits(flash: FlashBackend) -> None:
    layout = BATCHES["packed"]
    runs = []
    for _ in range(2):
        inputs = heads(2, 75)
        out = _routed(flash, layout, inputs, Routing(2, sub_block=4))
        runs.append([out, *torch.autograd.grad(out.sum(), inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("causal", [True, False])
def test_a_document_full_of_nan_stays_alone(flash: FlashBackend, causal: bool) -> None:
    """Several sizes in one rectangle: weights of 0 must not carry what another document holds."""
    segments = torch.zeros(1, 160, dtype=torch.long)
    segments[0, 70:] = 1
    layout = Layout.build(1, 160, BLOCK, segments)
    assert len(layout.stream.buckets) == 2
    clean, spoiled = heads(1, 160), heads(1, 160)
    for rows in spoiled:
        rows.data[:, :, :70] = float("nan")
    results = []
    for inputs in (clean, spoiled):
        out = _routed(flash, layout, inputs, Routing(1, sub_block=4), causal)
        results.append([out, *torch.autograd.grad(out[:, :, 70:].sum(), inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other[:, :, 70:], one[:, :, 70:], rtol=0, atol=1e-12)
    assert results[1][0][:, :, :70].isnan().all()
