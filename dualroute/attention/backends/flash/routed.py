"""Routed attention: own block and chosen blocks through flash attention, merged with the far blocks.

In: queries (H, S, d), keys and values (H_kv, S, d) of a stream, and what `select_blocks` chose. Out:
(H, S, d); `backends.torch.routed` says what is in the softmax. Causal only.

Three parts, whatever the length: own blocks are sequences of one flash call, (token, block) pairs those of
another (`pairs`), and the far blocks a matrix product (`far`), whose softmax holds the log-sum-exps of the
other two as columns. The backward pass gives each part the output and log-sum-exp of the whole softmax.

A pair that is none (-1: a token has fewer blocks to choose from) stands in the list as the first block of its
document, with the weight 0: so the list has one length, and no document meets another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualroute.attention.backends.flash import far, operators, pairs
from dualroute.attention.backends.flash.operators import Spans
from dualroute.attention.backends.flash.pairs import Plan
from dualroute.attention.backends.flash.slabs import Slab, first_of_slots, slabs
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
    """Routed attention, (H, S, d), of a stream; `selected` (H_kv, S, 1 + top_k) as `select_blocks` gives it.

    Raises:
        ValueError: not causal.
    """
    if not causal:
        raise ValueError("causal=False has no flash attention: use dualroute.attention.routed_attention")
    return _Routed.apply(
        query, key.contiguous(), value.contiguous(), selected.to(torch.int32), stream, routing.far_summary
    )


def _grouped(rows: Tensor, kv_heads: int) -> Tensor:
    """(H, S, ...) -> (H_kv, S, group, ...), contiguous; a view where a group is one head."""
    return rows.unflatten(0, (kv_heads, -1)).transpose(1, 2).contiguous()


def _read(selected: Tensor, stream: Stream) -> Tensor:
    """selected, int64, with the first block of the document in the place of -1: it is below all others."""
    return torch.maximum(selected, first_of_slots(stream))


def _own_spans(stream: Stream) -> Spans:
    """Each block with itself."""
    bounds = pairs.numbers(stream, stream.num_blocks + 1, stream.block)
    return Spans(bounds, bounds, stream.block, stream.block, -1, 0)


class _Exact(NamedTuple):
    """What is read exactly: own blocks (H_kv, S, group, d) with log-sum-exps (H_kv, S, group); and pairs,
    sorted (P, group, d), with log-sum-exps (H_kv, S, group, C), and the place (H_kv, S, C) of each."""

    own: Tensor
    own_lse: Tensor
    pairs: Tensor
    pair_lse: Tensor
    place: Tensor


def _merge(
    exact: _Exact,
    query: Tensor,
    summary: Summary | None,
    selected: Tensor,
    read: Tensor,
    stream: Stream,
    slab: Slab,
    out: Tensor,
) -> Tensor:
    """One softmax over all parts of a slab, written into out (H, S, d); its log-sum-exp (H_kv, documents,
    slots, group)."""
    kv_heads, _, group, dim = query.shape
    own = slab.of_rows(exact.own)  # (H_kv, documents, slots, group, d)
    by_slot = own.shape[:4]
    width = 0 if summary is None else slab.width
    chosen = selected.shape[2]
    shape = (kv_heads * by_slot[1], by_slot[2] * group, width + 1 + chosen)
    logits = exact.own_lse.new_empty(shape)  # (X, R, columns): far blocks, the own block, chosen ones
    of_pairs = logits[..., width + 1 :].view(*by_slot, chosen)
    torch.cat(
        [slab.of_rows(exact.own_lse)[..., None], slab.of_rows(exact.pair_lse)],
        dim=-1,
        out=logits[..., width:].view(*by_slot, 1 + chosen),
    )
    of_pairs.masked_fill_((slab.of_rows(selected) < 0)[..., None, :], NEG_INF)
    columns = None
    if summary is not None:
        columns = far.columns(query, summary, read, stream, slab)
        far.fill_logits(logits[..., :width], columns, stream, slab)
    total = logits.logsumexp(-1, keepdim=True)
    weights = logits.softmax(-1)
    place = slab.of_rows(exact.place).flatten(0, 2)
    merged = pairs.bag_sum(exact.pairs, place, stream, weights[..., width + 1 :]).view(*shape[:2], dim)
    merged.view(own.shape).addcmul_(own, weights[..., width].view(*by_slot, 1))
    if columns is not None:
        merged.baddbmm_(weights[..., :width], columns.values)
    target = slab.of_rows(out).unflatten(0, (kv_heads, group))  # (H_kv, group, documents, slots, d)
    target.copy_(merged.view(own.shape).permute(0, 3, 1, 2, 4))
    return total.view(by_slot)


def _far_backward(
    grad: Tensor,
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    summary: Summary,
    read: Tensor,
    stream: Stream,
    to_query: Tensor,
) -> Summary:
    """Gradients of the summary; those of the queries are added to to_query (H_kv, S, group, d) in place."""
    wide_grad = grad.to(lse.dtype)
    delta = (wide_grad * out).sum(-1)  # (H_kv, S, group)
    heads = query.shape[0] * query.shape[2]
    parts = slabs(stream, heads)
    whole = None if len(parts) == 1 else Summary(*(torch.zeros_like(part) for part in summary))
    for slab in parts:
        columns = far.columns(query, summary, read, stream, slab)
        rows, of_delta, of_lse = (
            slab.of_rows(part).flatten(0, 1).flatten(1, 2) for part in (wide_grad, delta, lse)
        )  # (X, R, d), (X, R), (X, R)
        to_rows, *to_summary = far.backward(
            rows, of_delta[..., None], of_lse[..., None], columns, stream, slab
        )
        of_slab = slab.of_rows(to_query)
        of_slab.add_(to_rows.view(of_slab.shape))
        to_blocks = [part.unflatten(0, (len(query), -1)) for part in to_summary]
        if whole is None:
            return Summary(*(part.flatten(1, 2) for part in to_blocks))
        for total, part in zip(whole, to_blocks, strict=True):
            total.unflatten(1, (slab.documents, slab.blocks))[:, :, slice(*slab.columns)].add_(part)
    assert whole is not None
    return whole


class _Routed(torch.autograd.Function):
    """The joint softmax over a token's own block, its selected blocks and the summaries of the others."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, selected: Tensor, stream: Stream, order: str
    ) -> Tensor:
        kv_heads = len(key)
        grouped = _grouped(query, kv_heads)  # (H_kv, S, group, d)
        group = grouped.shape[2]
        own, own_lse = operators.forward(
            query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), _own_spans(stream)
        )
        own = own.unflatten(1, (kv_heads, group)).transpose(0, 1)  # (H_kv, S, group, d)
        own_lse = own_lse.unflatten(0, (kv_heads, group)).transpose(1, 2)  # (H_kv, S, group)
        read = _read(selected, stream)
        plan = pairs.plan(read, stream)
        parts, pair_lse = pairs.forward(grouped, key, value, plan, stream)
        pair_lse = pair_lse.index_select(1, plan.place.flatten()).view(group, *selected.shape)
        pair_lse = pair_lse.permute(1, 2, 0, 3)  # (H_kv, S, group, C)
        summary = far.summarise(key, value, stream, order)

        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        exact = _Exact(own, own_lse, parts.to(own_lse.dtype), pair_lse, plan.place.view(selected.shape))
        of_slabs = [
            _merge(exact, grouped, summary, selected, read, stream, slab, out)
            for slab in slabs(stream, len(query))
        ]
        lse = of_slabs[0] if len(of_slabs) == 1 else torch.cat(of_slabs, dim=2)
        lse = lse.flatten(1, 2)  # (H_kv, S, group)
        ctx.stream = stream
        ctx.save_for_backward(query, key, value, selected, *(summary or (None, None)), out, lse, *plan)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, selected, summary_keys, summary_values, out, lse, *listed = ctx.saved_tensors
        stream, plan = ctx.stream, Plan(*listed)
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
            _own_spans(stream),
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
            to_summary = _far_backward(
                grad, grouped, grouped_out, lse, summary, _read(selected, stream), stream, to_query
            )
            far.summarise_backward(to_summary, key, to_key, to_value, stream.block)
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        grad_query.unflatten(0, (kv_heads, group)).copy_(to_query.transpose(1, 2))
        return grad_query, to_key.to(key.dtype), to_value.to(value.dtype), None, None, None
