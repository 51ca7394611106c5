"""The sink joins a running softmax: values and gradients are those of one softmax over all keys."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dualroute.attention import Layout
from dualroute.attention.backends.torch.sink import merge_sink, sink_backward
from dualroute.attention.core.layout import Stream

BLOCK = 4


def inputs(stream: Stream, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values of a stream, and a key and value of each slot's own that were read before."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, stream.num_slots, group, 6)
    keys = (shape[0], shape[1], shape[3])
    return tuple(  # type: ignore[return-value]
        torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in (shape, keys, keys, keys, keys)
    )


def joint(
    stream: Stream, query: Tensor, key: Tensor, value: Tensor, own: Tensor, own_value: Tensor
) -> Tensor:
    """One softmax over the slot's own key and, behind a document's first block, its keys."""
    first = torch.arange(stream.num_blocks) - stream.block_in_document()
    sink = (first[:, None] * BLOCK + torch.arange(BLOCK)).repeat_interleave(BLOCK, 0)  # (S, block) slots
    outside = (stream.block_in_document() > 0).repeat_interleave(BLOCK)
    logits = torch.cat(
        [
            (query * own[:, :, None]).sum(-1, keepdim=True),
            torch.einsum("hsgd,hsbd->hsgb", query, key[:, sink]).masked_fill(
                ~outside[:, None, None], -math.inf
            ),
        ],
        dim=-1,
    )
    weights = (logits / math.sqrt(query.shape[-1])).softmax(-1)
    values = torch.cat([own_value[:, :, None], value[:, sink]], dim=2)  # (H, S, 1 + block, d)
    return weights @ values


@pytest.mark.parametrize("group", [1, 3])
def test_it_joins_the_softmax(group: int) -> None:
    segments = torch.tensor([[0] * 13 + [1] * 8 + [2] * 3 + [3] * 16])
    stream = Layout.build(1, 40, BLOCK, segments).stream
    query, key, value, own, own_value = inputs(stream, group)
    expected = joint(stream, query, key, value, own, own_value)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (query, key, value), cotangent)

    with torch.no_grad():
        lse = (query * own[:, :, None]).sum(-1) / math.sqrt(query.shape[-1])
        out = own_value[:, :, None].expand_as(query).clone()
        merge_sink(query, key, value, stream, out, lse)
        torch.testing.assert_close(out, expected)

        # what the slot's own key adds to the gradient of the query, from the merged softmax
        weight = ((query * own[:, :, None]).sum(-1) / math.sqrt(query.shape[-1]) - lse).exp()
        change = (cotangent * own_value[:, :, None]).sum(-1) - (cotangent * out).sum(-1)
        grad_query = (weight * change)[..., None] * own[:, :, None] / math.sqrt(query.shape[-1])
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        sink_backward(cotangent, query, key, value, stream, out, lse, grad_query, grad_key, grad_value)
    for got, want in zip((grad_query, grad_key, grad_value), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_documents_of_one_block_have_none() -> None:
    stream = Layout.build(3, BLOCK, BLOCK).stream
    query, key, value, *_ = (rows.detach() for rows in inputs(stream, 1))
    out, lse = query.clone(), query[..., 0].clone()
    merge_sink(query, key, value, stream, out, lse)
    assert torch.equal(out, query)
    assert torch.equal(lse, query[..., 0])
