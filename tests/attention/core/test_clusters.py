"""Blocks of similar keys: the order, the stream with copies, and what attention reads of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dualroute.attention import DualRouting, Layout, Routing, backend, reference, routed_attention
from dualroute.attention.backends import cpp
from dualroute.attention.core.clusters import similar_order, span_sizes, spread
from dualroute.attention.statistics import routing_statistics
from tests.attention.helpers import assert_same_with_gradients, batches, expected, heads, run, to_stream

BLOCK, SUB_BLOCK, SPAN = 8, 4, 32
HOW = [("minmax", "second_order", 2), ("moment", "first_order", 1), ("mean", "none", 3)]


def _routing(router: str = "minmax", far_summary: str = "second_order", top_k: int = 2, span: int = SPAN):
    return Routing(top_k, router, far_summary, SUB_BLOCK, span)


def _run(layout: Layout, inputs: tuple[Tensor, ...], routing: Routing) -> Tensor:
    return run(lambda q, k, v, s: routed_attention(q, k, v, s, routing), layout, inputs)


def test_the_order_halves_at_medians_and_is_that_of_the_reference() -> None:
    keys = torch.randn(2, 3, 32, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keys[0] = keys[0].round()  # many equal values
    order = similar_order(keys, 8)
    for row in range(2):
        assert torch.equal(order[row], reference.regroup(keys[row], 4))
    assert torch.equal(order.sort(-1).values, torch.arange(32).expand(2, 3, 32))
    channel = keys[1, 0].var(0).argmax()
    first, second = keys[1, 0, order[1, 0], channel].chunk(2)
    assert first.max() < second.min()
    assert torch.equal(similar_order(torch.ones(1, 16, 3), 4)[0], torch.arange(16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_give_the_same_order(dtype: torch.dtype) -> None:
    keys = torch.randn(2, 3, 64, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    keys[0, 0] = keys[0, 0].round()
    assert torch.equal(cpp.similar_order(keys, 8), similar_order(keys, 8))


def test_each_token_reads_each_past_block_once() -> None:
    assert span_sizes(16) == (16, 4, 1)
    assert span_sizes(8) == (8, 2, 1)
    layout = Layout.build(2, 21 * 4 + 2, 4)
    wider = spread(layout.stream, 8)
    assert wider is not None
    stream = wider.stream
    copied, *ranges = stream.hidden_blocks()
    number = torch.arange(stream.num_blocks)
    of_text = torch.full((stream.num_slots,), -1)
    of_text[wider.place] = torch.arange(layout.stream.num_slots)
    for copies in wider.copies:
        of_text[copies.slots] = (copies.spans[:, None] + torch.arange(copies.tokens)).flatten()
    for own in number[copied == 0].tolist():
        seen = (number >= int(stream.first_blocks()[own])) & (number < own)
        for begin, end in zip(ranges[::2], ranges[1::2], strict=True):
            seen &= (number < begin[own]) | (number >= end[own])
        tokens = of_text.view(-1, 4)[seen].flatten().sort().values
        last = int(wider.source[own * 4])
        assert torch.equal(tokens, torch.arange(last - last % (22 * 4), last))


@pytest.mark.usefixtures("each_kernels")
@pytest.mark.parametrize(("router", "far_summary", "top_k"), HOW)
@pytest.mark.parametrize("name", ["any length", "packed and padded"])
def test_equals_the_reference(name: str, router: str, far_summary: str, top_k: int) -> None:
    layout, inputs = batches(107)[name], heads(2, 107)
    how = {"top_k": top_k, "router": router, "far_summary": far_summary, "sub_block": SUB_BLOCK}
    wanted = expected(
        lambda q, k, v: reference.clustered(q, k, v, block=BLOCK, cluster_span=SPAN, **how), layout, inputs
    )
    assert_same_with_gradients(_run(layout, inputs, _routing(router, far_summary, top_k)), wanted, inputs)
    if name == "any length":
        plain = _run(layout, inputs, _routing(router, far_summary, top_k, 0))
        assert (plain - wanted).abs().max() > 0.01


@pytest.mark.usefixtures("each_kernels")
def test_with_all_blocks_it_is_full_attention_and_half_precision_is_near() -> None:
    layout, inputs = Layout.build(1, 90, BLOCK), heads(1, 90)
    full = expected(reference.full, layout, inputs)
    assert_same_with_gradients(_run(layout, inputs, _routing(top_k=20)), full, inputs)
    rounded = tuple(rows.detach().bfloat16() for rows in inputs)
    exact = _run(layout, tuple(rows.double() for rows in rounded), _routing())
    assert (_run(layout, rounded, _routing()).double() - exact).abs().max() < 0.05


@pytest.mark.usefixtures("each_kernels")
@pytest.mark.parametrize("router", ["minmax", "moment"])
@torch.no_grad()
def test_the_cache_gives_the_same_and_nobody_sees_what_comes(router: str) -> None:
    torch.manual_seed(0)
    layer = DualRouting(
        16, 4, window=5, global_mode="routed", block=BLOCK, top_k=1, router=router, sub_block=SUB_BLOCK,
        cluster_span=SPAN, qk_norm=True,
    ).double()  # fmt: skip
    hidden = torch.randn(2, 107, 16, dtype=torch.float64)
    whole = layer(hidden)
    for chunks in ([1] * 107, [30, 50, 1, 26], [97] + [1] * 10):
        cache = layer.new_cache(2, 107, capacity=20)
        parts = [layer(part, cache=cache) for part in hidden.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    changed = hidden.clone()
    changed[:, 41:] += 1
    other = layer(changed)
    assert torch.equal(other[:, :41], whole[:, :41])
    assert not torch.equal(other[:, 80:], whole[:, 80:])


@torch.no_grad()
def test_a_cache_goes_on_after_its_rows_were_put_in_another_order() -> None:
    torch.manual_seed(0)
    layer = DualRouting(16, 4, window=5, global_mode="routed", block=4, top_k=1, sub_block=2, cluster_span=16)
    hidden = torch.randn(2, 60, 16)
    cache = layer.new_cache(2, 60, cache_dtype="int8")
    layer(hidden[:, :30], cache=cache)
    layer(hidden[:, 30:31], cache=cache)
    cache.select(torch.tensor([1]))
    swapped = layer.new_cache(1, 60, cache_dtype="int8")
    layer(hidden[1:, :30], cache=swapped)
    layer(hidden[1:, 30:31], cache=swapped)
    for token in range(31, 60):
        part = hidden[1:, token : token + 1]
        torch.testing.assert_close(layer(part, cache=cache), layer(part, cache=swapped))
    far = cache.global_cache
    assert far is not None
    assert far.places is not None
    assert torch.equal(far.places.sort(1).values, torch.arange(60, dtype=torch.int32).expand(2, 60))
    assert not torch.equal(far.places[0], torch.arange(60, dtype=torch.int32))


@pytest.mark.parametrize("exact", [None, 0])
def test_statistics_are_shares_of_what_is_read(exact: int | None) -> None:
    layout = Layout.build(1, 107, BLOCK)
    rows = [to_stream(layout, part.detach()).float() for part in heads(1, 107)]
    found = routing_statistics(*rows, layout.stream, _routing(), max_exact_blocks=exact, causal=True)
    plain = routing_statistics(*rows, layout.stream, _routing(span=0), max_exact_blocks=exact, causal=True)
    shares = [float(found[f"mass_{name}"]) for name in ("own", "sink", "selected", "far")]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    if exact is None:  # in full, own block and sink are what they are in any order
        assert shares[:2] == pytest.approx([float(plain["mass_own"]), float(plain["mass_sink"])])
        assert shares[2] > float(plain["mass_selected"])


def test_back_ends_without_copies_leave_them_to_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from dualroute.attention.backends.flash.backend import FLASH

    monkeypatch.setattr(backend, "_wanted_for", lambda rows: FLASH)
    query = torch.zeros(1, 8)
    assert backend.choose(query, block=8, copies=True) is backend.plain()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cluster_span": 48}, "cluster_span=48 is not block=16 times 1, 2, 4, ...: use 64, or 0"),
        ({"cluster_span": 64, "block": 24, "sub_block": 8}, "block=24 must be 8 times 1, 2, 4"),
        ({"cluster_span": 64, "causal": False}, "cluster_span=64 with causal=False"),
        ({"cluster_span": -1}, "cluster_span=-1 is too small"),
    ],
)
def test_what_cannot_be_halved_is_refused(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DualRouting(16, 4, **{"block": 16, "sub_block": 4, **options})
