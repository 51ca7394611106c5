"""A number that is none stays in its document: what shares its batch, stream or tile is as ever."""

from __future__ import annotations

import itertools
import os
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualroute.attention import (
    DualRouting,
    Layout,
    Routing,
    full_attention,
    local_attention,
    routed_attention,
    select_blocks,
)
from dualroute.attention.backend import VARIABLE
from dualroute.attention.core.cache import GlobalCache
from dualroute.attention.decoding import decode_global
from tests.attention.helpers import ORDERS, ROUTERS

pytestmark = pytest.mark.usefixtures("each_kernels")

LENGTHS = (1, 70, 8, 131, 9, 40, 700, 66, 3)  # of the documents; the stream holds the shortest first
POISON = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
ROUTES = ("routed", "local", "full")


@cache
def _layout(block: int = 8) -> Layout:
    segments = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None]
    return Layout.build(1, len(segments[0]), block, segments)


def _document_of_slot(layout: Layout) -> Tensor:
    """(S,) the document of each slot, -1 in slots without a token."""
    return layout.to_stream(layout.documents[..., None] + 1)[:, 0] - 1


def _inputs(layout: Layout, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(1, layout.length, heads * 8, generator=generator) for heads in (4, 2, 2, 4)]
    streams = [layout.to_stream(part).unflatten(1, (-1, 8)).transpose(0, 1).to(dtype) for part in rows]
    return [part.contiguous() for part in streams]


def _results(
    layout: Layout, inputs: list[Tensor], route: str, routing: Routing, causal: bool
) -> list[Tensor]:
    """Chosen blocks, output and gradients, each (heads, S, ...)."""
    *rows, cotangent = [part.clone() for part in inputs]
    rows = [part.requires_grad_() for part in rows]
    options = {"top_k": routing.top_k, "router": routing.router, "sub_block": 4, "causal": causal}
    chosen = select_blocks(rows[0], rows[1], layout.stream, **options)
    if route == "routed":
        out = routed_attention(*rows, layout.stream, routing, causal=causal)
    elif route == "local":
        out = local_attention(*rows, layout.stream, window=21, causal=causal)
    else:
        out = full_attention(*rows, layout.stream, causal=causal)
    return [chosen.sort(-1).values, out, *torch.autograd.grad(out, rows, cotangent)]


@cache
def _clean(
    route: str, routing: Routing, causal: bool, dtype: torch.dtype, seed: int, kernels: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs, and the results that all poisoned ones are compared with; ``kernels`` are the ones in use."""
    assert os.environ[VARIABLE] == kernels
    inputs = _inputs(_layout(), dtype, seed)
    return inputs, _results(_layout(), inputs, route, routing, causal)


def _compare(
    route: str,
    routing: Routing,
    document: int,
    where: str,
    poison: float,
    dtype: torch.dtype,
    seed: int = 0,
    causal: bool = True,
) -> None:
    layout = _layout()
    owner = _document_of_slot(layout)
    clean, wanted_ones = _clean(route, routing, causal, dtype, seed, os.environ[VARIABLE])
    dirty = [part.clone() for part in clean]
    tokens = (owner == document).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed + document)
    token = tokens[torch.randint(len(tokens), (1,), generator=generator)]
    for letter in where:
        dirty["qkvg".index(letter)][:, token, 3] = poison
    others = (owner >= 0) & (owner != document)
    names = ("chosen blocks", "output", "gradient of q", "gradient of k", "gradient of v")
    results = _results(layout, dirty, route, routing, causal)
    for name, wanted, got in zip(names, wanted_ones, results, strict=True):
        assert torch.equal(got[:, others], wanted[:, others]), (name, document, where, poison)
        own_kernels = os.environ[VARIABLE] == "cpp" and (route != "full" or dtype.itemsize > 2)
        if name == "output" and where != "g" and poison != poison and own_kernels:
            # and it is not hidden either, as by torch's own attention (in full, in half precision)
            assert not got[:, tokens].isfinite().all()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "document",  # quick are the shortest, one of several tiles, and one that ends inside of a block
    [pytest.param(k, marks=[] if k in (0, 3, 4) else pytest.mark.slow) for k in range(len(LENGTHS))],
)
@pytest.mark.parametrize("causal", [True, False])
def test_of_every_document(causal: bool, route: str, document: int) -> None:
    for where in ("qg", "k", "v"):
        how = (document, where, POISON["nan"], torch.float32)
        _compare(route, Routing(2, sub_block=4), *how, causal=causal)


@pytest.mark.parametrize(("router", "order"), itertools.product(ROUTERS, ORDERS))
def test_for_every_router_and_summary(router: str, order: str) -> None:
    for poison, where in itertools.product(POISON.values(), "qkv"):
        _compare("routed", Routing(2, router, order, 4), 3, where, poison, torch.float32)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(ROUTES),
    st.integers(0, len(LENGTHS) - 1),
    st.sampled_from("qkvg"),
    st.sampled_from(sorted(POISON)),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(0, 9),
    st.sampled_from([0, 1, 3, 9]),
    st.booleans(),
)
def test_wherever_it_stands(
    route: str,
    document: int,
    where: str,
    poison: str,
    dtype: torch.dtype,
    seed: int,
    top_k: int,
    causal: bool,
) -> None:
    how = (document, where, POISON[poison], dtype, seed)
    _compare(route, Routing(top_k, sub_block=4), *how, causal=causal)


@pytest.mark.parametrize(("mode", "causal"), [("routed", True), ("auto", True), ("routed", False)])
def test_through_the_layer(mode: str, causal: bool) -> None:
    torch.manual_seed(0)
    how = {"global_mode": mode, "causal": causal}
    layer = DualRouting(32, 4, num_kv_heads=2, window=21, block=8, sub_block=4, top_k=2, **how)
    layout = _layout()
    hidden = torch.randn(1, layout.length, 32)
    for document in (0, 3, 6):
        dirty = hidden.clone()
        inside = layout.documents[0] == document
        dirty[0, inside.nonzero()[-1], 5] = float("nan")
        results = []
        for rows in (hidden, dirty):
            rows = rows.clone().requires_grad_()
            out = layer(rows, layout=layout)
            results.append([out, *torch.autograd.grad(out, rows, torch.ones_like(out))])
        for wanted, got in zip(*results, strict=True):
            assert torch.equal(got[0, ~inside], wanted[0, ~inside])


@pytest.mark.parametrize("cache_dtype", ["auto", "int4"])
@pytest.mark.parametrize("poison", POISON)
def test_texts_of_a_batch_that_is_decoded(poison: str, cache_dtype: str) -> None:
    """One text is poisoned in the middle of its prompt or at a single step: the others go on as ever."""
    torch.manual_seed(0)
    layer = DualRouting(32, 4, window=10, block=8, sub_block=4, top_k=2, global_mode="routed")
    hidden = torch.randn(3, 60, 32)
    for place in (5, 45):
        outputs = []
        for rows in (hidden, hidden.clone()):
            if rows is not hidden:
                rows[1, place] = POISON[poison]
            cache = layer.new_cache(3, 60, cache_dtype=cache_dtype)
            with torch.no_grad():
                parts = [layer(rows[:, :30], cache=cache)]
                parts += [layer(rows[:, at : at + 1], cache=cache) for at in range(30, 60)]
            outputs.append(torch.cat(parts, 1))
        assert torch.equal(outputs[1][[0, 2]], outputs[0][[0, 2]])
        assert torch.equal(outputs[1][1, :place], outputs[0][1, :place]) or place < 30
        assert os.environ[VARIABLE] == "torch" or not outputs[1][1, place].isfinite().any()


def test_a_text_whose_scores_are_all_minus_infinity() -> None:
    """Nothing is chosen for it, and nothing is read in the place of what was not chosen."""
    torch.manual_seed(0)
    cache = GlobalCache(2, 64, 8, 8, "mean", 8, "first_order", None, torch.float32)
    cache.append(torch.randn(2, 60, 8), torch.randn(2, 60, 8))
    query = torch.rand(2, 1, 1, 8)
    with torch.no_grad():
        wanted = decode_global(query, cache, 2, exact=False)
        cache.features[0] = float("-inf")
        got = decode_global(query, cache, 2, exact=False)
        none_chosen = decode_global(query[:1].expand(2, -1, -1, -1), cache, 0, exact=False)
    assert torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[0], none_chosen[0])
