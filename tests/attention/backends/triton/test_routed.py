"""Routed attention of the kernels: values and gradients against the explicit mask of the specification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dualroute.attention import Layout, Routing, reference
from dualroute.attention.backends.triton import far, pair_lists, routed_attention, select_blocks
from dualroute.attention.backends.triton import routed_backward as of_backward
from dualroute.attention.backends.triton import routed_forward as of_forward
from dualroute.attention.backends.triton.routed import routed_backward, routed_forward
from dualroute.attention.backends.triton.tiles import Tile, block_places
from tests.attention.backends.triton.helpers import (
    DEVICE,
    TOLERANCE,
    assert_close_with_gradients,
    both,
    run_on_device,
)
from tests.attention.helpers import ORDERS, batches, expected, from_stream, to_stream

LENGTH, BLOCK, SUB_BLOCK = 75, 8, 4


def _routed(layout: Layout, inputs: tuple[Tensor, ...], routing: Routing, causal: bool = True) -> Tensor:
    return run_on_device(
        lambda q, k, v, s: routed_attention(q, k, v, s, routing, causal=causal), layout, inputs
    )


def _reference(layout: Layout, inputs: tuple[Tensor, ...], routing: Routing, causal: bool = True) -> Tensor:
    options = {
        "causal": causal,
        "top_k": routing.top_k,
        "router": routing.router,
        "far_summary": routing.far_summary,
        "sub_block": routing.sub_block,
    }
    return expected(lambda q, k, v: reference.routed(q, k, v, block=layout.block, **options), layout, inputs)


def _compare(
    layout: Layout,
    inputs: tuple[tuple[Tensor, ...], ...],
    routing: Routing,
    causal: bool = True,
    tolerance: float = TOLERANCE,
) -> None:
    low, wide = inputs
    wanted = _reference(layout, wide, routing, causal)
    assert_close_with_gradients(_routed(layout, low, routing, causal), low, wanted, wide, tolerance)


@pytest.mark.parametrize("name", batches())
def test_equals_the_explicit_mask(name: str) -> None:
    layout = batches(LENGTH, BLOCK)[name]
    heads = 2 if name == "packed and padded" else 1
    _compare(layout, both(2, layout.length, heads, 1), Routing(1, sub_block=SUB_BLOCK))


@pytest.mark.parametrize("name", ["whole blocks", "shorter than a block", "packed and padded"])
def test_both_sides_of_a_token(name: str) -> None:
    layout = batches(LENGTH, BLOCK)[name]
    _compare(layout, both(2, layout.length, 1, 1), Routing(1, sub_block=SUB_BLOCK), causal=False)


@pytest.mark.parametrize("order", ["first_order", "none"])
def test_both_sides_of_a_token_of_every_summary(order: str) -> None:
    layout = Layout.build(1, 44, BLOCK)
    _compare(layout, both(1, 44, 1, 1), Routing(1, "mean", order), causal=False)


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_are_read_in_parts(causal: bool) -> None:
    """Of 32 keys in float32; the last part of a block, and the last block, are not full."""
    layout = Layout.build(1, 150, 40)
    _compare(layout, both(1, 150, 1, 1), Routing(1, sub_block=8), causal)


@pytest.mark.parametrize(
    ("dim", "block", "length"), [(256, 80, 100), pytest.param(8, 256, 520, marks=pytest.mark.slow)]
)
def test_the_widest_heads_and_the_largest_blocks(dim: int, block: int, length: int) -> None:
    """Of half-precision numbers, whose tiles are those of a GPU."""
    layout = Layout.build(1, length, block)
    inputs = both(1, length, 1, 1, dim, torch.float16)
    _compare(layout, inputs, Routing(1), causal=False, tolerance=4e-3)


@pytest.mark.parametrize("causal", [True, False])
def test_tiles_narrower_than_a_word_of_bits(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of wide heads are: the far blocks of a tile need not begin with the first bit of a word."""
    for module in (of_forward, of_backward, far):
        monkeypatch.setattr(module, "tile_for", lambda *_: Tile(16, 16, 4))
    _compare(Layout.build(1, 71, 2), both(1, 71, 1, 1), Routing(1, sub_block=2), causal)


def test_pieces_change_nothing_for_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_lists, "MAX_PAIR_ROWS", 100)
    _compare(Layout.build(1, 46, BLOCK), both(1, 46), Routing(1, sub_block=SUB_BLOCK), causal=False)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("chooser", ["moment", "mean"])
def test_every_router_and_summary(chooser: str, order: str) -> None:
    layout = Layout.build(1, 40, BLOCK)
    _compare(layout, both(1, 40, 1, 1), Routing(1, chooser, order))


@pytest.mark.parametrize(
    ("kv_heads", "top_k"),
    [(1, 5), (4, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0), (4, 5)))],
)
def test_any_number_of_blocks_and_heads(kv_heads: int, top_k: int) -> None:
    layout = Layout.build(1, 46, BLOCK)
    _compare(layout, both(1, 46, 4, kv_heads), Routing(top_k, sub_block=SUB_BLOCK))


@pytest.mark.parametrize(
    ("dim", "block", "length", "group"), [(64, 16, 80, 1), (96, 16, 70, 1), (10, 24, 100, 3), (6, 1, 9, 3)]
)
def test_any_size_of_heads_and_blocks(dim: int, block: int, length: int, group: int) -> None:
    layout = Layout.build(1, length, block)
    _compare(layout, both(1, length, group, 1, dim), Routing(1, sub_block=min(block, 8)))


@pytest.mark.parametrize("order", ["second_order", "none"])
def test_choosing_everything_is_full_attention(order: str) -> None:
    layout = batches(LENGTH, BLOCK)["packed and padded"]
    low, wide = both(2, LENGTH, 1, 1)
    full = expected(reference.full, layout, wide)
    actual = _routed(layout, low, Routing(20, "minmax", order, SUB_BLOCK))
    assert_close_with_gradients(actual, low, full, wide)


@pytest.mark.parametrize(("rows", "count"), [pytest.param(100, 4, marks=pytest.mark.slow), (300, 2)])
def test_pieces_and_chunks_change_nothing(rows: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a head at a time, or single heads; and a block that many tokens read is shared by programs."""
    monkeypatch.setattr(pair_lists, "MAX_PAIR_ROWS", rows)
    monkeypatch.setattr(pair_lists, "CHUNK", 16)
    layout = Layout.build(1, 46, BLOCK)
    stream = layout.stream
    assert len(list(pair_lists.pieces(2, 2, stream.num_slots, 2, stream.num_blocks))) == count
    _compare(layout, both(1, 46), Routing(1, sub_block=SUB_BLOCK))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    layout = Layout.build(1, 60, BLOCK)
    low, wide = both(1, 60, 2, 1, 16, dtype)
    moved = layout.to(DEVICE)
    query, key = (to_stream(moved, x.detach()) for x in low[:2])
    selected = select_blocks(query, key, moved.stream, top_k=2, sub_block=SUB_BLOCK)
    actual = _routed(layout, low, Routing(2, sub_block=SUB_BLOCK))
    assert actual.dtype == dtype
    again = run_on_device(
        lambda q, k, v, s: routed_attention(q, k, v, s, Routing(2), selected=selected), layout, low
    )
    assert torch.equal(actual, again)
    reference_out = _reference(layout, wide, Routing(2, sub_block=SUB_BLOCK))
    assert_close_with_gradients(actual, low, reference_out, wide, tolerance)


def test_later_tokens_change_nothing() -> None:
    layout = Layout.build(1, 64, BLOCK)
    low, _ = both(1, 64, 2, 1)
    before = _routed(layout, low, Routing(1, sub_block=SUB_BLOCK))
    changed = [x.detach().clone() for x in low]
    for rows in changed:
        rows[:, :, 43:] = -3 * rows[:, :, 43:] + 1
    after = _routed(layout, tuple(changed), Routing(1, sub_block=SUB_BLOCK))
    assert torch.equal(before[:, :, :43], after[:, :, :43])
    assert not torch.equal(before[:, :, 43:], after[:, :, 43:])


def test_slots_without_a_token_change_nothing() -> None:
    layout = Layout.build(1, 45, BLOCK).to(DEVICE)
    low, _ = both(1, 45, 2, 1)
    rows = [to_stream(layout, x.detach()) for x in low]
    before = routed_attention(*rows, layout.stream, Routing(1, sub_block=SUB_BLOCK))
    assert layout.stream.slot_valid is not None
    empty = ~layout.stream.slot_valid
    for part in rows:
        part[:, empty] = 50.0
    after = routed_attention(*rows, layout.stream, Routing(1, sub_block=SUB_BLOCK))
    assert torch.equal(from_stream(layout, before), from_stream(layout, after))


@pytest.mark.parametrize("order", [pytest.param("first_order", marks=pytest.mark.slow), "none"])
def test_operators(order: str) -> None:
    layout = Layout.build(1, 3, 1).to(DEVICE)
    query, key, value = (torch.randn(1, 3, 4, device=DEVICE, requires_grad=True) for _ in range(3))
    far = [torch.randn(1, 3, 4, device=DEVICE, requires_grad=True) for _ in range(2)]
    selected = select_blocks(query.detach(), key.detach(), layout.stream, top_k=0, sub_block=1)
    summaries = far if order != "none" else [None, None]
    arguments = (query, key, value, *summaries, selected, block_places(layout.stream), False)
    torch.library.opcheck(torch.ops.dualroute.routed_forward.default, arguments)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    out, lse = routed_forward(*detached)
    torch.library.opcheck(
        torch.ops.dualroute.routed_backward.default,
        (torch.ones_like(out), *detached[:-1], out, lse, False),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert len(routed_backward(torch.ones_like(out), *detached[:-1], out, lse, False)) == 5
