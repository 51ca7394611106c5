"""Routed attention: each token reads its own block, the sink, top_k chosen blocks, and a summary of the rest.

In: queries (H, S, d), keys and values (H_kv, S, d) of a stream (see `layout`). Out: (H, S, d).
One softmax over: the keys of the token's own (incomplete) block up to itself; the keys of the first block of
its document (the sink, not counted in top_k); the keys of the top_k best-scored complete past blocks
(`router`); and one pseudo-key for every other past block (`far_summary`). With top_k >= all blocks this is
full attention, exactly.

The parts are computed one after the other and merged by their log-sum-exps. The backward pass gives each
part's kernel the merged output and log-sum-exp, which is the exact gradient of the joint softmax (see
`kernels`).

Besides inputs and output, what is kept for the backward pass is one log-sum-exp per row
and the list of chosen pairs. Nothing of size n x n, nor n x blocks, exists at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dualroute.attention.arguments import check_rows, check_selected, check_whole
from dualroute.attention.backend import fast_kernels
from dualroute.attention.dispatch import Plan
from dualroute.attention.far_summary import (
    FAR_SUMMARIES,
    Summary,
    far_backward,
    merge_far,
    summarise,
    summarise_backward,
)
from dualroute.attention.kernels import NEG_INF, accumulation_dtype, attend, attend_backward, without_autocast
from dualroute.attention.layout import Stream
from dualroute.attention.options import check_name
from dualroute.attention.router import ROUTERS, select_blocks
from dualroute.attention.selected import merge_selected, selected_backward
from dualroute.attention.sink import merge_sink, sink_backward


@dataclass(frozen=True)
class Routing:
    """How a token chooses what it reads: see `router` and `far_summary` for the names.

    Raises:
        TypeError, ValueError: a number is none or too small, or a name is unknown.
    """

    top_k: int = 8
    router: str = "minmax"
    far_summary: str = "second_order"
    sub_block: int = 16

    def __post_init__(self) -> None:
        check_whole(0, top_k=self.top_k)
        check_whole(1, sub_block=self.sub_block)
        check_name("router", self.router, ROUTERS)
        check_name("far_summary", self.far_summary, FAR_SUMMARIES)


@without_autocast
def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stream: Stream,
    routing: Routing,
    *,
    causal: bool = True,
    selected: Tensor | None = None,
) -> Tensor:
    """Routed attention, (H, S, d), of a stream.

    Args:
        query: (H, S, d).
        key, value: (H_kv, S, d), 0 in slots without a token.
        stream, routing: where the documents lie; what is read.
        selected: (H_kv, S, 1 + top_k) as `select_blocks` gives it; chosen here when None.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or does not fit the others.
    """
    check_rows(stream, query, key, value)
    if selected is not None:
        check_selected(selected, key, stream, causal)
    else:
        selected = select_blocks(
            query.detach(),
            key.detach(),
            stream,
            top_k=routing.top_k,
            router=routing.router,
            sub_block=routing.sub_block,
            causal=causal,
        )
    kernels = fast_kernels(query, block=stream.block, causal=causal)
    if kernels is not None:
        return kernels.routed_attention(query, key, value, stream, routing, selected=selected)
    grouped = query.unflatten(0, (key.shape[0], -1)).transpose(1, 2).contiguous()  # (H_kv, S, group, d)
    out = _Routed.apply(
        grouped, key.contiguous(), value.contiguous(), selected, stream, routing.far_summary, causal
    )
    return out.transpose(1, 2).flatten(0, 1)


def _own_tiles(rows: Tensor, block: int) -> Tensor:
    """(H_kv, S, group, ...) -> (H_kv * nb, group, block, ...) view: each block with the queries inside it."""
    return rows.unflatten(1, (-1, block)).flatten(0, 1).transpose(1, 2)


def _blocks(rows: Tensor, block: int) -> Tensor:
    """(H_kv, S, d) -> (H_kv * nb, 1, block, d) view."""
    return rows.reshape(-1, 1, block, rows.shape[-1])


def _key_mask(stream: Stream, kv_heads: int, causal: bool, dtype: torch.dtype) -> Tensor | None:
    """(H_kv * nb, 1, 1, block): -inf at slots without a token, which only a later query could see."""
    if causal or stream.slot_valid is None:
        return None
    closed = ~stream.slot_valid.view(-1, 1, 1, stream.block)
    return (
        torch.zeros(closed.shape, dtype=dtype, device=closed.device)
        .masked_fill_(closed, NEG_INF)
        .repeat(kv_heads, 1, 1, 1)
    )


class _Routed(torch.autograd.Function):
    """The joint softmax over a token's own block, its selected blocks and the summaries of the others."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        selected: Tensor,
        stream: Stream,
        far_summary: str,
        causal: bool,
    ) -> Tensor:
        kv_heads = len(query)
        block = stream.block
        accumulate = accumulation_dtype(query.dtype)
        mask = _key_mask(stream, kv_heads, causal, accumulate)
        key_blocks, value_blocks = _blocks(key, block), _blocks(value, block)

        own, own_lse = attend(_own_tiles(query, block), key_blocks, value_blocks, mask=mask, causal=causal)
        out = own.transpose(1, 2).reshape(query.shape)
        lse = own_lse.transpose(1, 2).reshape(query.shape[:3]).contiguous()
        summary = summarise(key, value, stream, far_summary, causal)
        if summary is not None:
            merge_far(query, summary, selected, stream, causal, out, lse)
        merge_sink(query, key, value, stream, out, lse)
        planned = merge_selected(
            query, key_blocks, value_blocks, selected[..., 1:], stream.num_blocks, mask, out, lse
        )

        out = out.to(query.dtype)
        ctx.stream, ctx.causal = stream, causal
        ctx.pieces = [piece for piece, _ in planned]
        listed = [tensor for _, tiles in planned for tensor in tiles]
        ctx.save_for_backward(query, key, value, *(summary or (None, None)), selected, out, lse, *listed)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, summary_keys, summary_values, selected, out, lse, *listed = ctx.saved_tensors
        stream, causal = ctx.stream, ctx.causal
        kv_heads = len(query)
        block = stream.block
        accumulate = accumulation_dtype(query.dtype)
        mask = _key_mask(stream, kv_heads, causal, accumulate)
        grad = grads[0].contiguous()
        key_blocks, value_blocks = _blocks(key, block), _blocks(value, block)

        to_query, grad_key, grad_value = attend_backward(
            _own_tiles(grad, block),
            _own_tiles(query, block),
            key_blocks,
            value_blocks,
            _own_tiles(out, block),
            _own_tiles(lse, block),
            mask=mask,
            causal=causal,
        )
        grad_query = to_query.transpose(1, 2).reshape(query.shape)
        if summary_keys is not None:
            delta = (grad.to(accumulate) * out.to(accumulate)).sum(-1)
            summary = Summary(summary_keys, summary_values)
            to_summary = far_backward(grad, query, summary, selected, stream, causal, delta, lse, grad_query)
            rows = (grad_key.view(key.shape), grad_value.view(key.shape))
            summarise_backward(to_summary, summary, key, stream, causal, *rows)
        sink_backward(
            grad,
            query,
            key,
            value,
            stream,
            out,
            lse,
            grad_query,
            grad_key.view(key.shape),
            grad_value.view(key.shape),
        )
        planned = [(piece, Plan(*listed[3 * i : 3 * i + 3])) for i, piece in enumerate(ctx.pieces)]
        selected_backward(
            planned,
            grad,
            query,
            key_blocks,
            value_blocks,
            mask,
            out,
            lse,
            grad_query,
            grad_key,
            grad_value,
        )
        return (
            grad_query.to(query.dtype),
            grad_key.reshape(key.shape).to(key.dtype),
            grad_value.reshape(value.shape).to(value.dtype),
            None,
            None,
            None,
            None,
        )
