"""Full attention per document, and which documents are routed."""

from __future__ import annotations

import pytest
import torch

from dualroute.attention import Layout, Routing, full_attention, global_attention, reference
from dualroute.attention.backend import plain_torch
from dualroute.attention.backends.torch import full as global_route
from dualroute.attention.backends.torch.full import exact_blocks
from tests.attention.helpers import assert_same_with_gradients, batches, expected, heads, run

pytestmark = pytest.mark.usefixtures("each_kernels")

ROUTING = Routing(2, sub_block=4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", batches())
def test_full_equals_the_reference(name: str, causal: bool) -> None:
    layout = batches()[name]
    inputs = heads(2, layout.length)
    actual = run(lambda q, k, v, s: full_attention(q, k, v, s, causal=causal), layout, inputs)
    wanted = expected(lambda q, k, v: reference.full(q, k, v, causal=causal), layout, inputs)
    assert_same_with_gradients(actual, wanted, inputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("limit", [0, 3, 4, 100])
def test_documents_up_to_the_limit_are_read_in_full(limit: int, causal: bool) -> None:
    layout = batches()["packed and padded"]
    inputs = heads(2, layout.length)

    def route(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if -(-q.shape[1] // 8) <= limit:
            return reference.full(q, k, v, causal=causal)
        return reference.routed(q, k, v, block=8, top_k=2, sub_block=4, causal=causal)

    actual = run(
        lambda q, k, v, s: global_attention(
            q, k, v, s, routing=ROUTING, max_exact_blocks=limit, causal=causal
        ),
        layout,
        inputs,
    )
    assert_same_with_gradients(actual, expected(route, layout, inputs), inputs)


def test_the_routed_mode_is_routed_attention_of_every_document() -> None:
    """Reading top_k + 2 blocks in full is not a shortcut that changes anything."""
    layout = batches()["packed and padded"]
    inputs = heads(2, layout.length)
    limit = exact_blocks("routed", 8, 2)
    actual = run(
        lambda q, k, v, s: global_attention(q, k, v, s, routing=ROUTING, max_exact_blocks=limit),
        layout,
        inputs,
    )
    wanted = expected(
        lambda q, k, v: reference.routed(q, k, v, block=8, top_k=2, sub_block=4), layout, inputs
    )
    assert_same_with_gradients(actual, wanted, inputs)


def test_modes_set_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(global_route, "AUTO_BREAK_EVEN", 4096)
    assert exact_blocks("full", 64, 8) is None
    assert exact_blocks("routed", 64, 8) == 10
    assert exact_blocks("auto", 64, 8) == 64
    assert exact_blocks("auto", 1024, 8) == 10


def test_full_attention_of_a_plain_batch_is_one_call_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: torch.Tensor, **kwargs: object) -> torch.Tensor:
        calls.append((args[0].shape, kwargs["attn_mask"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with plain_torch():
        for length in (64, 61):
            run(full_attention, Layout.build(3, length, 8), heads(3, length))
    assert calls == [(torch.Size([3, 4, 64, 4]), None)] * 2
