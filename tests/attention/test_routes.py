"""Which documents are routed, and which are read in full."""

from __future__ import annotations

import pytest
import torch

from dualroute.attention import Routing, global_attention, reference
from dualroute.attention.core.routing import exact_blocks
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
