"""Routed attention: own block and chosen blocks through flash attention, merged with the far blocks.

In: queries (H, S, d), keys and values (H_kv, S, d) of a stream, and what `select_blocks` chose. Out:
(H, S, d); `backends.torch.routed` says what is in the softmax.

Three parts: own blocks are sequences of one flash call, (token, block) pairs those of another (`pairs`), and
the far blocks a product of matrices (`far`). One softmax over the three log-sum-exps merges them. The
backward pass gives each part the output and log-sum-exp of the whole softmax.

A pair that is none (-1: a token has fewer blocks to choose from) stands in the list as the first block of its
document, with the weight 0: so the list has one length, and no document meets another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualroute.attention.backends.flash import far, operators, pairs
from dualroute.attention.backends.flash.operators import Spans
from dualroute.attention.backends.flash.pairs import Plan
from dualroute.attention.backends.flash.slabs import first_of_slots
from dualroute.attention.core.far_summary import Summary
from dualroute.attention.core.layout import Stream
from dualroute.attention.core.precision import NEG_INF, without_autocast
from dualroute.attention.core.routing import Routing

NO_PAIR = 1e30  # exp(logit - NO_PAIR) is 0


@without_autocast
def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stream: Stream,
    routing: Routing,
    *,
    selected: Tensor,
    causal: bool = True,
) -> Tensor:
    """Routed attention, (H, S, d); `selected` (H_kv, S, 1 + top_k) as `select_blocks` gives it."""
    selected = selected.to(torch.int32)
    return _Routed.apply(
        query, key.contiguous(), value.contiguous(), selected, stream, routing.far_summary, causal
    )


def _grouped(rows: Tensor, kv_heads: int) -> Tensor:
    """(H, S, ...) -> (H_kv, S, group, ...), contiguous; a view where a group is one head."""
    return rows.unflatten(0, (kv_heads, -1)).transpose(1, 2).contiguous()


def _read(selected: Tensor, stream: Stream) -> Tensor:
    """selected, int64, with the first block of the document in the place of -1: it is below all others."""
    return torch.maximum(selected, first_of_slots(stream))


def _own_spans(stream: Stream, causal: bool) -> Spans:
    """Each block with itself. Not causal, the slots that fill up a block are a sequence of their own."""
    bounds = pairs.numbers(stream, stream.num_blocks + 1, stream.block)
    if far.has_holes(stream, causal):
        bounds = stream.cached("block and token ends", lambda: _block_and_token_ends(stream, bounds))
    return Spans(bounds, bounds, stream.block, stream.block, -1, 0 if causal else -1)


def _block_and_token_ends(stream: Stream, bounds: Tensor) -> Tensor:
    """(2 * num_blocks + 1,) int32: where each block begins, where its tokens end."""
    ends = bounds[:-1] + stream.tokens_in_block().to(torch.int32)
    return torch.cat([torch.stack([bounds[:-1], ends], dim=1).flatten(), bounds[-1:]])


def _softmax(own_lse: Tensor, pair_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp (H_kv, S, group) and weights (H_kv, S, group, 1 + C) of the own block and the pairs."""
    shares = torch.cat([own_lse, pair_lse], dim=-1).log_softmax(-1)
    return (own_lse - shares[..., :1])[..., 0], shares.exp_()


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
        order: str,
        causal: bool,
    ) -> Tensor:
        kv_heads = len(key)
        grouped = _grouped(query, kv_heads)  # (H_kv, S, group, d)
        group = grouped.shape[2]
        own, own_lse = operators.forward(
            query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), _own_spans(stream, causal)
        )
        own = own.unflatten(1, (kv_heads, group)).transpose(0, 1)  # (H_kv, S, group, d)
        own_lse = own_lse.unflatten(0, (kv_heads, group)).transpose(1, 2)  # (H_kv, S, group)
        read = _read(selected, stream)
        plan = pairs.plan(read, stream, causal)
        parts, pair_lse = pairs.forward(grouped, key, value, plan, stream)
        pair_lse = pair_lse.index_select(1, plan.place.flatten()).view(group, *selected.shape)
        pair_lse = pair_lse.permute(1, 2, 0, 3).masked_fill_((selected < 0)[:, :, None], NEG_INF)
        summary = far.summarise(key, value, stream, order, causal)
        lses = [own_lse[..., None], pair_lse]  # (H_kv, S, group, 1) and (H_kv, S, group, C)
        of_far = None
        if summary is None:
            lse, weights = _softmax(*lses)
        else:
            lse, weights, of_far = far.forward(grouped, lses, summary, read, stream, causal)
        merged = pairs.bag_sum(parts, plan.place, stream, weights[..., 1:]).view(grouped.shape)
        merged.addcmul_(own, weights[..., :1])
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        target = out.unflatten(0, (kv_heads, group)).transpose(1, 2)
        if of_far is None:
            target.copy_(merged)
        else:
            torch.add(merged, of_far, out=target)
        ctx.stream, ctx.causal = stream, causal
        ctx.save_for_backward(query, key, value, selected, *(summary or (None, None)), out, lse, *plan)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, selected, summary_keys, summary_values, out, lse, *listed = ctx.saved_tensors
        stream, causal, plan = ctx.stream, ctx.causal, Plan(*listed)
        kv_heads = len(key)
        grouped, grad, grouped_out = (_grouped(rows, kv_heads) for rows in (query, grads[0], out))
        group = grouped.shape[2]
        own_query, own_key, own_value = operators.backward(
            grads[0].transpose(0, 1),
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            out.transpose(0, 1),
            lse.transpose(1, 2).flatten(0, 1),
            _own_spans(stream, causal),
        )
        of_pairs = torch.where(selected < 0, NO_PAIR, lse.permute(2, 0, 1)[..., None])  # (group, H_kv, S, C)
        to_query, to_key, to_value = pairs.backward(
            grad,
            grouped,
            key,
            value,
            grouped_out,
            of_pairs.flatten(1),
            plan,
            stream,
        )
        to_query.add_(own_query.unflatten(1, (kv_heads, group)).transpose(0, 1))
        to_key.add_(own_key.transpose(0, 1))
        to_value.add_(own_value.transpose(0, 1))
        if summary_keys is not None:
            summary = Summary(summary_keys, summary_values)
            read = _read(selected, stream)
            to_summary = far.backward(
                grad, grouped, grouped_out, lse, summary, read, stream, causal, to_query
            )
            far.summarise_backward(to_summary, summary, key, stream, causal, to_key, to_value)
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        grad_query.unflatten(0, (kv_heads, group)).copy_(to_query.transpose(1, 2))
        return grad_query, to_key.to(key.dtype), to_value.to(value.dtype), None, None, None, None
