"""Which documents are routed, and which are read in full."""

from __future__ import annotations

import pytest
import torch

from dualroute.attention import Routing, global_attention, reference
from dualroute.attention.core.layout import Stream
from dualroute.attention.core.routing import SharedChoice, exact_blocks
from tests.attention.helpers import assert_same_with_gradients, batches, expected, heads, run

pytestmark = pytest.mark.usefixtures("each_kernels")

ROUTING = Routing(2, sub_block=4)


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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["any length", "packed and padded"])
def test_a_second_layer_reads_what_the_first_has_chosen(name: str, causal: bool) -> None:
    layout = batches()[name]
    first, second = (heads(2, layout.length, seed=seed) for seed in (0, 1))
    choice, how = SharedChoice(), {"block": 8, "top_k": 2, "sub_block": 4, "causal": causal}

    def route(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: Stream) -> torch.Tensor:
        return global_attention(q, k, v, s, routing=ROUTING, max_exact_blocks=4, causal=causal, choice=choice)

    def choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        chosen.append(reference.select(q, k, **how))
        return v.new_zeros(len(q), q.shape[1], q.shape[2])

    def read(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        selected = next(selections)
        if -(-q.shape[1] // 8) <= 4:
            return reference.full(q, k, v, causal=causal)
        return reference.routed(q, k, v, selected=selected, **how)

    chosen: list[torch.Tensor] = []
    expected(choose, layout, first)
    selections = iter(chosen)
    run(route, layout, first)
    actual = run(route, layout, second)
    wanted = expected(read, layout, second)
    assert_same_with_gradients(actual, wanted, second)
    other = run(
        lambda q, k, v, s: global_attention(q, k, v, s, routing=ROUTING, max_exact_blocks=4, causal=causal),
        layout,
        second,
    )
    assert not torch.allclose(actual, other, atol=1e-3)  # it would have chosen others


def test_blocks_of_similar_keys_are_not_shared() -> None:
    layout = batches()["any length"]
    routing = Routing(2, sub_block=4, cluster_span=32)
    with pytest.raises(ValueError, match="cluster_span=32 with a shared choice"):
        run(
            lambda q, k, v, s: global_attention(
                q, k, v, s, routing=routing, max_exact_blocks=4, choice=SharedChoice()
            ),
            layout,
            heads(2, layout.length),
        )
