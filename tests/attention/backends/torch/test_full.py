"""Full attention per document."""

from __future__ import annotations

import pytest
import torch

from dualroute.attention import Layout, full_attention, reference
from dualroute.attention.backend import plain_torch
from tests.attention.helpers import assert_same_with_gradients, batches, expected, heads, run

pytestmark = pytest.mark.usefixtures("each_kernels")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", batches())
def test_full_equals_the_reference(name: str, causal: bool) -> None:
    layout = batches()[name]
    inputs = heads(2, layout.length)
    actual = run(lambda q, k, v, s: full_attention(q, k, v, s, causal=causal), layout, inputs)
    wanted = expected(lambda q, k, v: reference.full(q, k, v, causal=causal), layout, inputs)
    assert_same_with_gradients(actual, wanted, inputs)


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
