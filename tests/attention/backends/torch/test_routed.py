"""Routed attention: values and gradients against the explicit mask, and what must hold whatever is chosen."""

from __future__ import annotations

import itertools

import pytest
import torch

from dualroute.attention import Layout, Routing, reference, routed_attention
from dualroute.attention.backends.torch import dispatch, far, select
from tests.attention.helpers import (
    ORDERS,
    ROUTERS,
    assert_same_with_gradients,
    batches,
    expected,
    heads,
    run,
)

pytestmark = pytest.mark.usefixtures("each_kernels")

BLOCK, SUB_BLOCK = 8, 4


def _routed(
    layout: Layout, inputs: tuple[torch.Tensor, ...], routing: Routing, causal: bool = True
) -> torch.Tensor:
    return run(lambda q, k, v, s: routed_attention(q, k, v, s, routing, causal=causal), layout, inputs)


def _reference(
    layout: Layout, inputs: tuple[torch.Tensor, ...], routing: Routing, causal: bool = True
) -> torch.Tensor:
    options = {
        "top_k": routing.top_k,
        "router": routing.router,
        "far_summary": routing.far_summary,
        "sub_block": routing.sub_block,
    }
    return expected(
        lambda q, k, v: reference.routed(q, k, v, block=layout.block, causal=causal, **options),
        layout,
        inputs,
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", batches())
@pytest.mark.parametrize(("chooser", "order"), itertools.product(ROUTERS, ORDERS))
def test_equals_the_explicit_mask(name: str, chooser: str, order: str, causal: bool) -> None:
    layout = batches(block=BLOCK)[name]
    inputs = heads(2, layout.length)
    routing = Routing(2, chooser, order, SUB_BLOCK)
    assert_same_with_gradients(
        _routed(layout, inputs, routing, causal), _reference(layout, inputs, routing, causal), inputs
    )


@pytest.mark.parametrize("top_k", [0, 1, 5])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_any_number_of_blocks_and_heads(kv_heads: int, top_k: int) -> None:
    layout = batches(block=BLOCK)["packed and padded"]
    inputs = heads(2, layout.length, 4, kv_heads)
    routing = Routing(top_k, sub_block=SUB_BLOCK)
    assert_same_with_gradients(_routed(layout, inputs, routing), _reference(layout, inputs, routing), inputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", batches())
@pytest.mark.parametrize("order", ORDERS)
def test_choosing_everything_is_full_attention(name: str, order: str, causal: bool) -> None:
    layout = batches(block=BLOCK)[name]
    inputs = heads(2, layout.length)
    full = expected(lambda q, k, v: reference.full(q, k, v, causal=causal), layout, inputs)
    assert_same_with_gradients(
        _routed(layout, inputs, Routing(20, "minmax", order, SUB_BLOCK), causal), full, inputs
    )


def test_grouped_heads_equal_repeated_keys() -> None:
    """With equal query heads in a group, a choice by the sum is each head's own choice."""
    layout = Layout.build(1, 75, BLOCK)
    query, key, value = (rows.detach() for rows in heads(1, 75, 2, 2))
    query = query.repeat_interleave(2, 1)
    routing = Routing(2, sub_block=SUB_BLOCK)
    grouped = _routed(layout, (query, key, value), routing)
    repeated = _routed(layout, (query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)), routing)
    torch.testing.assert_close(grouped, repeated)


@pytest.mark.parametrize("chooser", ROUTERS)
def test_the_past_never_feels_the_future(chooser: str) -> None:
    layout = Layout.build(1, 90, BLOCK)
    inputs = heads(1, 90)
    routing = Routing(2, chooser, "second_order", SUB_BLOCK)
    before = _routed(layout, inputs, routing)
    for token in (1, 33, 40, 71, 89):
        gradients = torch.autograd.grad(before[:, :, :token].square().sum(), inputs, retain_graph=True)
        assert all(not gradient[:, :, token:].any() for gradient in gradients)
        changed = tuple(rows.detach().clone() for rows in inputs)
        for rows in changed:
            rows[:, :, token:] = 3 * torch.randn_like(rows[:, :, token:])
        after = _routed(layout, changed, routing)
        assert float((after - before).detach()[:, :, :token].abs().max()) == 0
        assert not torch.equal(after[:, :, token], before[:, :, token])


def test_a_prefix_is_the_beginning_of_the_whole() -> None:
    inputs = heads(1, 75)
    routing = Routing(2, sub_block=SUB_BLOCK)
    whole = _routed(Layout.build(1, 75, BLOCK), inputs, routing)
    for length in (1, 7, 8, 9, 40, 57, 74):
        prefix = tuple(rows[:, :, :length] for rows in inputs)
        part = _routed(Layout.build(1, length, BLOCK), prefix, routing)
        torch.testing.assert_close(part, whole[:, :, :length], rtol=0, atol=1e-12)


@pytest.mark.parametrize("chooser", ROUTERS)
def test_ties_are_broken_the_same_way_everywhere(chooser: str) -> None:
    """Equal blocks of small integers score the same: the earlier one wins, in a prefix as in the whole."""
    query, key, value = heads(1, 120)
    key = (key[:, :, :BLOCK] * 2).round().repeat(1, 1, 15, 1)
    inputs = ((query * 2).round(), key, value)
    inputs = tuple(rows.detach().requires_grad_() for rows in inputs)
    routing = Routing(2, chooser, "none", SUB_BLOCK)
    layout = Layout.build(1, 120, BLOCK)
    whole = _routed(layout, inputs, routing)
    assert_same_with_gradients(whole, _reference(layout, inputs, routing), inputs)
    part = _routed(Layout.build(1, 83, BLOCK), tuple(rows[:, :, :83] for rows in inputs), routing)
    torch.testing.assert_close(part, whole[:, :, :83], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("order", "causal"),
    [
        ("second_order", True),
        ("none", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("second_order", False),
                ("none", True),
                ("first_order", True),
                ("first_order", False),
            )
        ),
    ],
)
def test_gradcheck(order: str, causal: bool) -> None:
    layout = Layout.build(1, 14, 3, torch.tensor([[0] * 11 + [1] * 3]))
    inputs = heads(1, 14, 2, 1, 2)
    routing = Routing(1, "moment", order)
    assert torch.autograd.gradcheck(lambda *rows: _routed(layout, rows, routing, causal), inputs)


def test_the_far_summary_alone_gives_gradients_to_unread_blocks() -> None:
    layout = Layout.build(1, 48, BLOCK)
    inputs = heads(1, 48, 2, 1)
    for order, reaches in (("second_order", True), ("first_order", True), ("none", False)):
        out = _routed(layout, inputs, Routing(0, "minmax", order, SUB_BLOCK))
        gradients = torch.autograd.grad(out[:, :, -1].sum(), inputs[1:])
        for gradient in gradients:  # block 2 is neither the sink nor the own block of the last token
            assert bool(gradient[:, :, 2 * BLOCK : 3 * BLOCK].any()) == reaches


def test_equal_keys_make_the_summary_exact() -> None:
    """A block of one repeated key has no variance: its pseudo-key is the block itself."""
    layout = Layout.build(1, 64, BLOCK)
    query, key, value = (rows.detach() for rows in heads(1, 64, 2, 1))
    key = key[:, :, ::BLOCK].repeat_interleave(BLOCK, 2)
    inputs = (query, key, value)
    full = expected(reference.full, layout, inputs)
    for order in ("first_order", "second_order"):
        torch.testing.assert_close(_routed(layout, inputs, Routing(0, "minmax", order, SUB_BLOCK)), full)


def test_the_second_order_summary_is_the_better_one_on_mild_logits() -> None:
    layout = Layout.build(1, 256, 16)
    inputs = tuple(rows.detach() for rows in heads(1, 256, 2, 2, 16, scale=0.6))
    full = expected(reference.full, layout, inputs)
    errors = {
        order: float((_routed(layout, inputs, Routing(1, "moment", order)) - full).norm()) for order in ORDERS
    }
    assert errors["second_order"] < errors["first_order"] < errors["none"]


def test_pieces_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = batches(block=BLOCK)["packed and padded"]
    inputs = heads(2, layout.length)
    routing = Routing(2, sub_block=SUB_BLOCK)
    whole = _routed(layout, inputs, routing)
    monkeypatch.setattr(dispatch, "MAX_PAIRS", 3 * 37)
    monkeypatch.setattr(select, "MAX_SCORES", 1)
    monkeypatch.setattr(far, "MAX_LOGITS", 1)
    assert_same_with_gradients(_routed(layout, inputs, routing), whole, inputs)


def test_several_tiles_to_a_block() -> None:
    layout = Layout.build(1, 3 * dispatch.TILE, 16)
    inputs = heads(1, layout.length, 2, 1)
    routing = Routing(1)
    assert_same_with_gradients(_routed(layout, inputs, routing), _reference(layout, inputs, routing), inputs)


def test_the_same_every_time() -> None:
    layout = batches(block=BLOCK)["packed and padded"]
    inputs = tuple(rows.detach().float().requires_grad_() for rows in heads(2, layout.length))
    runs = []
    for _ in range(3):
        out = _routed(layout, inputs, Routing(2, sub_block=SUB_BLOCK))
        runs.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again, strict=True))


def test_padding_is_exactly_zero_and_gets_no_gradient() -> None:
    layout = batches(block=BLOCK)["padded"]
    padding = layout.documents < 0
    for causal in (True, False):
        inputs = heads(2, layout.length)
        out = _routed(layout, inputs, Routing(1, sub_block=SUB_BLOCK), causal)
        assert not out.transpose(1, 2)[padding].any()
        for gradient in torch.autograd.grad(out.square().sum(), inputs):
            assert not gradient.transpose(1, 2)[padding].any()


def test_half_precision_stays_near() -> None:
    layout = Layout.build(1, 128, 16)
    inputs = heads(1, 128, 2, 1, 16, scale=1.0)
    selected = select.select_blocks(*(rows[0].detach() for rows in inputs[:2]), layout.stream, top_k=2)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        rows = tuple(part.detach().to(dtype).requires_grad_() for part in inputs)
        out = run(
            lambda q, k, v, s: routed_attention(q, k, v, s, Routing(2), selected=selected), layout, rows
        )
        results.append((out, *torch.autograd.grad(out.square().sum(), rows)))
        assert all(part.dtype == dtype for part in results[-1])
    for exact, rounded in zip(*results, strict=True):
        error = (rounded.double() - exact).norm() / exact.norm()
        assert error.item() < 0.02


def test_nothing_quadratic_is_saved() -> None:
    """Eight times the length: about eight times the saved elements, and no saved tensor of n x nb or more."""
    totals = []
    for length in (256, 2048):
        layout = Layout.build(1, length, 16)
        inputs = tuple(rows.detach().float().requires_grad_() for rows in heads(1, length, 2, 1))
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: s.append(t.numel()) or t, lambda t: t
        ):
            run(lambda q, k, v, s: routed_attention(q, k, v, s, Routing(2)), layout, inputs)
        totals.append(sum(saved))
        assert max(saved) <= 8 * length * 2
    assert totals[1] < 1.3 * 8 * totals[0]
