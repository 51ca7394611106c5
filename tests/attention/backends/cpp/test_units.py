"""Products of bfloat16 in the C++ routes: right on any unit, and the portable form is what AMX computes.

AMX itself is tested where the processor has it. The portable form goes through the same packing and the same
softmax everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dualroute.attention import Layout, Routing
from dualroute.attention.backends import cpp
from dualroute.attention.core.layout import Stream

LENGTH = 330


@pytest.fixture(params=["portable", "AMX"])
def unit(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        cpp.use_unit(request.param)
    except ValueError:
        pytest.skip("no AMX here")
    yield request.param
    cpp.use_unit()


def _rows(stream: Stream, dim: int, heads: int = 2, seed: int = 0) -> list[Tensor]:
    """Queries of `heads` heads, keys and values of one, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((count, stream.num_slots, dim) for count in (heads, 1, 1, heads))
    rows = [torch.randn(size, generator=generator).bfloat16() for size in sizes]
    if stream.slot_valid is not None:
        rows = [part * stream.slot_valid[:, None] for part in rows]
    return rows


def _with_gradients(attend: Callable[..., Tensor], rows: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    *inputs, grad = (part.to(dtype) for part in rows)
    inputs = [part.clone().requires_grad_() for part in inputs]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def _routed(stream: Stream, routing: Routing, causal: bool, selected: Tensor) -> Callable[..., Tensor]:
    return lambda *rows: cpp.routed_attention(*rows, stream, routing, selected=selected, causal=causal)


def _local(stream: Stream, window: int, causal: bool) -> Callable[..., Tensor]:
    return lambda *rows: cpp.local_attention(*rows, stream, window=window, causal=causal)


def _layout(block: int, packed: bool) -> Layout:
    segments = (torch.arange(LENGTH) // 130)[None] if packed else None
    return Layout.build(1, LENGTH, block, segments)


def _tokens(rows: list[Tensor], stream: Stream) -> list[Tensor]:
    return rows if stream.slot_valid is None else [part[:, stream.slot_valid] for part in rows]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("dim", "block", "packed", "summary"),
    [
        (64, 64, False, "second_order"),
        (20, 16, True, "second_order"),
        (48, 32, True, "first_order"),
        (80, 96, False, "none"),
        (16, 128, True, "second_order"),
    ],
)
def test_as_near_to_float64_as_rounding_allows(
    dim: int, block: int, packed: bool, summary: str, causal: bool, unit: str
) -> None:
    """Relative errors of outputs and of all gradients: of bfloat16 weights, which are 2^-9 off at most."""
    stream, routing = _layout(block, packed).stream, Routing(2, far_summary=summary)
    rows = _rows(stream, dim)
    wide = [part.double() for part in rows]
    selected = cpp.select_blocks(*wide[:2], stream, top_k=2, causal=causal)
    for attend in (_routed(stream, routing, causal, selected), _local(stream, 45, causal)):
        results = (
            _tokens(_with_gradients(attend, rows, kind), stream) for kind in (torch.bfloat16, torch.float64)
        )
        for got, wanted in zip(*results, strict=True):
            assert (got.double() - wanted).norm() <= 0.004 * wanted.norm()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("router", ["minmax", "moment"])
@pytest.mark.parametrize("heads", [1, 3])
def test_the_same_blocks_are_chosen(heads: int, router: str, causal: bool, unit: str) -> None:
    """Bounds of bfloat16 keys are bfloat16 numbers; what sums of several queries leave of one counts too."""
    stream = Layout.build(1, 1000, 16).stream
    query, key, *_ = _rows(stream, 24, heads)
    options = {"top_k": 3, "router": router, "sub_block": 8, "causal": causal}
    got = cpp.select_blocks(query, key, stream, **options)
    wanted = cpp.select_blocks(query.double(), key.double(), stream, **options)
    assert torch.equal(got.sort(-1).values, wanted.sort(-1).values)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_document(poison: float, causal: bool, unit: str) -> None:
    layout = _layout(16, packed=True)
    stream = layout.stream
    clean = _rows(stream, 32)
    selected = cpp.select_blocks(*clean[:2], stream, top_k=2, causal=causal)
    documents = stream.first_blocks().repeat_interleave(stream.block)
    inside = documents == documents.unique()[1]
    for spoiled in range(4):
        dirty = [part.clone() for part in clean]
        dirty[spoiled][:, inside.nonzero()[7], 3] = poison
        for attend in (_routed(stream, Routing(2), causal, selected), _local(stream, 45, causal)):
            wanted_ones, results = (_with_gradients(attend, rows, torch.bfloat16) for rows in (clean, dirty))
            for got, wanted in zip(results, wanted_ones, strict=True):
                assert torch.equal(got[:, ~inside], wanted[:, ~inside])


def test_a_later_token_changes_nothing_before_it(unit: str) -> None:
    stream = _layout(32, packed=False).stream
    rows = _rows(stream, 32)
    selected = cpp.select_blocks(*rows[:2], stream, top_k=2)
    changed = [part.clone() for part in rows]
    for part in changed[:3]:
        part[:, 201:] += 1
    for attend in (_routed(stream, Routing(2), True, selected), _local(stream, 45, True)):
        before, after = attend(*rows[:3]), attend(*changed[:3])
        assert torch.equal(before[:, :201], after[:, :201])
        assert not torch.equal(before[:, 201:], after[:, 201:])


def test_threads_change_no_number(unit: str) -> None:
    stream = Layout.build(1, 3000, 32).stream
    rows = _rows(stream, 32)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(_with_gradients(_local(stream, 45, True), rows, torch.bfloat16))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_other_blocks_are_widened() -> None:
    """Blocks that are no multiple of a tile's side: floats are multiplied, bit for bit."""
    stream = Layout.build(1, 100, 24).stream
    rows = _rows(stream, 32)
    results = []
    for unit in ("floats", "portable"):
        cpp.use_unit(unit)
        results.append(_with_gradients(_local(stream, 45, True), rows, torch.bfloat16))
    cpp.use_unit()
    assert all(map(torch.equal, *results))


def test_a_unit_that_is_not_there_is_refused() -> None:
    before = cpp.unit_in_use()
    with pytest.raises(ValueError, match="unit is GPU: give one of floats, portable, AMX"):
        cpp.use_unit("GPU")
    assert cpp.unit_in_use() == before
