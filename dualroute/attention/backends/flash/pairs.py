"""The blocks that tokens chose, read exactly: (token, block) pairs sorted by block, one flash call for all.

In: queries (H_kv, S, group, d), keys and values (H_kv, S, d), and `read` (H_kv, S, C), the blocks that each
token reads besides its own, every one a block of its document. Out: `plan` sorts them; `forward` gives the
output and log-sum-exp of every pair; `backward` the gradients.

Pairs of one block follow each other and are cut into sequences of at most ROWS query rows; a sequence has a
copy of its block's keys. The heads of a group are rows of one sequence, so keys are not repeated for them.
How many sequences there are depends on the numbers of `read` alone, but how many there can be at most does
not: the surplus ones are empty, and the host is never told.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dualroute.attention.backends.flash import operators
from dualroute.attention.backends.flash.operators import Spans
from dualroute.attention.core.layout import Stream
from dualroute.attention.core.precision import accumulation_dtype

ROWS = 256  # query rows of a sequence: two tiles of the kernel


class Plan(NamedTuple):
    """P = H_kv * S * C pairs in sorted order, in N sequences; rows are head * S + slot, blocks head * nb + b."""

    token: Tensor  # (P,) int32 row of each pair
    place: Tensor  # (H_kv * S, C) int32 sorted place of each pair
    bound: Tensor  # (N + 1,) int32 where each sequence begins
    block: Tensor  # (N,) int32 the block that each sequence reads, ascending


def plan(read: Tensor, stream: Stream, group: int) -> Plan:
    """Sort the pairs; nothing is read back."""
    kv_heads, slots, chosen = read.shape
    pairs, buckets = read.numel(), kv_heads * stream.num_blocks
    step = max(1, ROWS // group)
    ordered, order = torch.sort((read + _head_offset(stream, kv_heads)).flatten(), stable=True)
    start = torch.searchsorted(ordered, _numbers(stream, buckets + 1), out_int32=True)
    # a sequence ends where a block ends, and after `step` pairs at the latest
    bound = torch.cat([start, _numbers(stream, -(-pairs // step), step)]).sort().values
    block = torch.searchsorted(start[1:-1], bound[:-1], right=True, out_int32=True)
    token = torch.div(order, chosen, rounding_mode="floor", out=torch.empty_like(read.view(-1)))
    place = torch.empty_like(token).scatter_(0, order, _numbers(stream, pairs))
    return Plan(token, place.view(kv_heads * slots, chosen), bound, block)


def _numbers(stream: Stream, count: int, step: int = 1) -> Tensor:
    """(count,) int32: 0, step, 2 * step ...; made once for all layers."""

    def compute() -> Tensor:
        return torch.arange(0, count * step, step, dtype=torch.int32, device=stream.device)

    return stream.cached(("numbers", count, step), compute)


def _head_offset(stream: Stream, kv_heads: int) -> Tensor:
    return _numbers(stream, kv_heads, stream.num_blocks)[:, None, None]


def _spans(plan: Plan, stream: Stream, group: int) -> Spans:
    bound = plan.bound if group == 1 else plan.bound * group
    key = _numbers(stream, len(plan.bound), stream.block)
    return Spans(bound, key, max(1, ROWS // group) * group, stream.block)


def _query_rows(rows: Tensor, plan: Plan) -> Tensor:
    """(H_kv, S, group, d) -> (P * group, 1, d), as the operators take queries."""
    dim = rows.shape[-1]
    return rows.flatten(2).flatten(0, 1).index_select(0, plan.token).view(-1, 1, dim)


def _key_rows(rows: Tensor, plan: Plan, block: int) -> Tensor:
    """(H_kv, S, d) -> (N * block, 1, d)."""
    return rows.reshape(-1, block * rows.shape[-1]).index_select(0, plan.block).view(-1, 1, rows.shape[-1])


def forward(query: Tensor, key: Tensor, value: Tensor, plan: Plan, stream: Stream) -> tuple[Tensor, Tensor]:
    """Output (P * group, d) in the type of the queries and log-sum-exp (P, group), in sorted order."""
    group = query.shape[2]
    out, lse = operators.forward(
        _query_rows(query, plan),
        _key_rows(key, plan, stream.block),
        _key_rows(value, plan, stream.block),
        _spans(plan, stream, group),
    )
    return out[:, 0], lse.view(-1, group)


def bag_sum(rows: Tensor, place: Tensor, group: int, stream: Stream, weights: Tensor | None = None) -> Tensor:
    """Back to tokens: rows (P * group, d) in sorted order -> (tokens * group, d), summed over a token's pairs.

    place (tokens, C); weights (..., group, C) of the tokens or None = 1. Sums are of `accumulation_dtype`, in
    a fixed order.
    """
    chosen = place.shape[1]
    if group > 1:
        place = torch.add(_numbers(stream, group)[:, None], place[:, None], alpha=group)
    return torch.embedding_bag(
        rows.to(accumulation_dtype(rows.dtype)),
        place.flatten(),
        _numbers(stream, place.numel() // chosen, chosen),
        per_sample_weights=None if weights is None else weights.reshape(-1),
    )[0]


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    stream: Stream,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries (H_kv, S, group, d), keys and values (H_kv, S, d), in `accumulation_dtype`.

    `grad` and `out` (H_kv, S, group, d) are of the whole softmax. `lse` (H_kv * S, C, group) is its
    log-sum-exp, for each pair; a huge one for what is no pair.
    """
    kv_heads, slots, group, dim = query.shape
    buckets = kv_heads * stream.num_blocks
    lse_rows = torch.empty_like(lse.flatten(0, 1)).index_copy_(
        0, plan.place.flatten().long(), lse.flatten(0, 1)
    )
    to_query, *to_blocks = operators.backward(
        _query_rows(grad, plan),
        _query_rows(query, plan),
        _key_rows(key, plan, stream.block),
        _key_rows(value, plan, stream.block),
        _query_rows(out, plan),
        lse_rows.view(1, -1),
        _spans(plan, stream, group),
    )
    # a block's sequences follow each other: their gradients are summed in this order
    first = torch.searchsorted(plan.block, _numbers(stream, buckets + 1), out_int32=True)
    to_key, to_value = (
        torch.embedding_bag(
            part.view(-1, stream.block * dim).to(accumulation_dtype(part.dtype)),
            _numbers(stream, len(plan.block)),
            first,
            include_last_offset=True,
        )[0].view(kv_heads, slots, dim)
        for part in to_blocks
    )
    return bag_sum(to_query[:, 0], plan.place, group, stream).view(query.shape), to_key, to_value
