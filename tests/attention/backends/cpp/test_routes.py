"""The C++ routes against plain torch: values and gradients, whatever the sizes, types and threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dualroute.attention import Layout, Routing, local_attention, routed_attention
from dualroute.attention import select_blocks as any_select_blocks
from dualroute.attention.backend import plain_torch
from dualroute.attention.backends import cpp as cpu_kernels
from dualroute.attention.core.layout import Stream
from tests.attention.helpers import ORDERS, ROUTERS, assert_same_with_gradients, heads, to_stream


def plain(function: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    """What a function gives on plain torch."""
    with plain_torch():
        return function(*arguments, **options)


def plain_select_blocks(*arguments: Any, **options: Any) -> Tensor:
    return plain(any_select_blocks, *arguments, **options)


@pytest.fixture(autouse=True)
def unit() -> Iterator[None]:
    yield
    cpu_kernels.use_unit()


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Three threads do not divide two key heads: the routed pieces of a head meet."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _stream_inputs(
    layout: Layout, num_heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    rows = heads(layout.batch, layout.length, num_heads, kv_heads, dim)
    return tuple(to_stream(layout, part.detach()).to(dtype).requires_grad_() for part in rows)


def _only_tokens(out: Tensor, stream: Stream) -> Tensor:
    return out if stream.slot_valid is None else out[:, stream.slot_valid]


def _documents(length: int, block: int) -> dict[str, Layout]:
    segments = (torch.arange(length) // (length // 3 + 5))[None]
    return {"one": Layout.build(1, length, block), "packed": Layout.build(1, length, block, segments)}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", ["one", "packed"])
@pytest.mark.parametrize("order", ORDERS)
def test_routed_pieces_meet(order: str, documents: str, causal: bool, threads: int) -> None:
    layout = _documents(2500, 32)[documents]
    inputs = _stream_inputs(layout, 4, 2, 8)
    stream, routing = layout.stream, Routing(2, far_summary=order)
    how = {"causal": causal}
    selected = plain_select_blocks(inputs[0].detach(), inputs[1].detach(), stream, top_k=2, **how)

    def run() -> Tensor:
        return _only_tokens(routed_attention(*inputs, stream, routing, selected=selected, **how), stream)

    assert_same_with_gradients(run(), plain(run), inputs, 1e-10)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", ["one", "packed"])
@pytest.mark.parametrize("window", [1, 64, 65, 700, pytest.param(5000, marks=pytest.mark.slow)])
def test_local_pieces_meet(window: int, documents: str, causal: bool, threads: int) -> None:
    layout = _documents(4500, 32)[documents]
    inputs = _stream_inputs(layout, 2, 1, 6)
    stream = layout.stream

    def run() -> Tensor:
        return _only_tokens(local_attention(*inputs, stream, window=window, causal=causal), stream)

    assert_same_with_gradients(run(), plain(run), inputs, 1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_threads_change_no_local_number(causal: bool) -> None:
    """Pieces of the local route depend on the shape alone, so sums do not depend on the number of threads."""
    layout = Layout.build(1, 5000, 8)
    inputs = _stream_inputs(layout, 2, 1, 16, torch.float32)
    results = []
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out = cpu_kernels.local_attention(*inputs, layout.stream, window=70, causal=causal)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(got, wanted) for got, wanted in zip(other, results[0], strict=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [1, 20, 64, 100, 192])
@pytest.mark.parametrize("dim", [6, 16, 80])
def test_any_size_of_heads_and_blocks(dim: int, block: int, causal: bool) -> None:
    layout = Layout.build(1, 5 * block + block // 3, block)
    inputs = _stream_inputs(layout, 2, 1, dim)
    stream, routing = layout.stream, Routing(1, "moment")

    def run() -> Tensor:
        both = [
            routed_attention(*inputs, stream, routing, causal=causal),
            local_attention(*inputs, stream, window=block + 3, causal=causal),
        ]
        return _only_tokens(torch.cat(both), stream)

    assert_same_with_gradients(run(), plain(run), inputs, 1e-10)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(("block", "sub_block"), [(8, 8), (32, 8), (64, 8), (96, 32)])
@pytest.mark.parametrize("top_k", [0, 3, 7])
@pytest.mark.parametrize("causal", [True, False])
def test_the_same_blocks_are_chosen(
    causal: bool, top_k: int, block: int, sub_block: int, router: str
) -> None:
    for layout in _documents(60 * block + 3, block).values():
        query, key, _ = (part.detach() for part in _stream_inputs(layout, 4, 2, 8))
        options = {"top_k": top_k, "router": router, "sub_block": sub_block, "causal": causal}
        got = cpu_kernels.select_blocks(query, key, layout.stream, **options)
        wanted = plain_select_blocks(query, key, layout.stream, **options)
        assert torch.equal(got.sort(-1).values, wanted.sort(-1).values)


def test_the_first_of_equal_blocks_is_chosen() -> None:
    """A text of equal keys: every block scores the same, so the earliest ones behind the sink are read."""
    layout = Layout.build(1, 80 * 4, 4)
    query = torch.ones(1, 320, 8)
    rows = query, query.clone(), layout.stream
    selected = cpu_kernels.select_blocks(*rows, top_k=3, sub_block=2)
    assert selected[0, -1].sort().values.tolist() == [0, 1, 2, 3]
    both_ways = cpu_kernels.select_blocks(*rows, top_k=3, sub_block=2, causal=False)
    for token, wanted in ((0, [-1, 1, 2, 3]), (9, [0, 1, 3, 4]), (319, [0, 1, 2, 3])):
        assert both_ways[0, token].sort().values.tolist() == wanted


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_other_types(causal: bool, dtype: torch.dtype, tolerance: float) -> None:
    """Half precision is rounded at the ends only: as near to float64 as its inputs' rounding allows."""
    layout = Layout.build(1, 700, 32)
    low = _stream_inputs(layout, 4, 2, 24, dtype)
    wide = tuple(part.detach().double().requires_grad_() for part in low)
    stream, routing, how = layout.stream, Routing(3), {"causal": causal}
    selected = plain_select_blocks(wide[0].detach(), wide[1].detach(), stream, top_k=3, **how)

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        parts = [
            routed_attention(*inputs, stream, routing, selected=selected, **how),
            local_attention(*inputs, stream, window=50, **how),
        ]
        out = _only_tokens(torch.cat(parts), stream)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    for got, wanted in zip(run(low), run(wide), strict=True):
        assert got.dtype == dtype
        assert (got.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("documents", ["one", "packed"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16_is_float32_rounded_at_the_end(
    causal: bool, router: str, documents: str, threads: int
) -> None:
    """The same blocks, and the same sums: rows are stored in half precision, nothing is computed in it.

    On AMX weights and their gradients are rounded too (test_units.py).
    """
    cpu_kernels.use_unit("floats")
    layout = _documents(2500, 32)[documents]
    low = _stream_inputs(layout, 4, 2, 40, torch.bfloat16)
    wide = tuple(part.detach().float() for part in low)
    stream, routing = layout.stream, Routing(2, router)
    how = {"causal": causal}
    options = {"top_k": 2, "router": router, **how}
    chosen = [cpu_kernels.select_blocks(*rows[:2], stream, **options) for rows in (low, wide)]
    assert torch.equal(*chosen)
    for attend in (
        lambda rows: cpu_kernels.routed_attention(*rows, stream, routing, selected=chosen[0], **how),
        lambda rows: cpu_kernels.local_attention(*rows, stream, window=90, **how),
    ):
        assert torch.equal(_only_tokens(attend(low), stream), _only_tokens(attend(wide), stream).bfloat16())


def test_heads_that_lie_apart_in_memory() -> None:
    """As projections give them: rows of all heads side by side."""
    layout = Layout.build(1, 300, 16)
    rows = [part.detach().transpose(0, 1).contiguous() for part in _stream_inputs(layout, 4, 2, 16)]
    inputs = tuple(part.transpose(0, 1).requires_grad_() for part in rows)
    assert not inputs[0].is_contiguous()

    def run() -> Tensor:
        return _only_tokens(routed_attention(*inputs, layout.stream, Routing(2)), layout.stream)

    assert_same_with_gradients(run(), plain(run), inputs, 1e-10)


def test_what_they_cannot_take_is_refused() -> None:
    rows = torch.zeros(1, 16, 4)
    stream = Layout.build(1, 16, 8).stream
    selected = torch.full((1, 16, 2), -1, dtype=torch.int32)
    for causal, block, message in (
        (True, 1, "no past one"),
        (False, 0, "no other one"),
        (False, 2, "no other"),
    ):
        selected[0, 0, 1] = block  # of a token of block 0
        with pytest.raises(ValueError, match=message):
            cpu_kernels.routed_attention(
                rows, rows, rows, stream, Routing(1), selected=selected, causal=causal
            )
    assert not cpu_kernels.available(rows.to("meta"))
    assert not cpu_kernels.available(rows.to(torch.int8))
    assert cpu_kernels.available(rows)
