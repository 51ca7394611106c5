"""The blocks that tokens chose, read exactly: (token, block) pairs sorted by block, one flash call for all.

In: queries (H_kv, S, group, d), keys and values (H_kv, S, d), and `read` (H_kv, S, C), the blocks that each
token reads besides its own, every one a block of its document. Out: `plan` sorts them; `forward` gives the
output and log-sum-exp of every pair; `backward` the gradients.

Pairs of one block follow each other and are cut into sequences of at most ROWS pairs; a sequence has a copy
of its block's keys, which the heads of a group share. Not causal, the slots without a token at the end of a
block are the keys of one more sequence, which has no queries.
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

ROWS = 256  # pairs of a sequence: two tiles of the kernel


class Plan(NamedTuple):
    """P = H_kv * S * C pairs, sorted, in N sequences; rows are head * S + slot, blocks head * nb + block."""

    token: Tensor  # (P,) int32 row of each pair
    place: Tensor  # (H_kv * S, C) int32 sorted place of each pair
    block: Tensor  # (N,) int32 the block that each sequence reads, ascending
    query: Tensor  # (N + 1,), or (2N + 1,) with those of keys without a token: int32 bounds of the queries
    key: Tensor  # the bounds of the keys, see `Spans`


def plan(read: Tensor, stream: Stream, causal: bool = True) -> Plan:
    """Sort the pairs of read (H_kv, S, C); nothing is read back."""
    kv_heads, slots, chosen = read.shape
    pairs, buckets = read.numel(), kv_heads * stream.num_blocks
    key = torch.empty_like(read, dtype=torch.int32)  # narrow keys sort faster
    torch.add(read, numbers(stream, kv_heads, stream.num_blocks)[:, None, None], out=key)
    ordered, order = torch.sort(key.flatten(), stable=True)
    start = torch.searchsorted(ordered, numbers(stream, buckets + 1), out_int32=True)
    # a sequence ends where a block ends, and after ROWS pairs at the latest
    bound = torch.cat([start, numbers(stream, -(-pairs // ROWS), ROWS)]).sort().values
    block = torch.searchsorted(start[1:-1], bound[:-1], right=True, out_int32=True)
    token = torch.div(order, chosen, rounding_mode="floor", out=torch.empty_like(ordered))
    place = torch.empty_like(token).scatter_(0, order, numbers(stream, pairs))
    keys = numbers(stream, len(bound), stream.block)
    if not causal and stream.slot_valid is not None:
        tokens = stream.cached(("tokens", kv_heads), lambda: _tokens(stream, kv_heads))
        ends = keys.new_empty(2 * len(bound) - 1)
        ends[0::2] = keys
        torch.add(keys[:-1], tokens.index_select(0, block), out=ends[1::2])
        bound, keys = bound.repeat_interleave(2)[1:], ends
    return Plan(token, place.view(kv_heads * slots, chosen), block, bound, keys)


def _tokens(stream: Stream, kv_heads: int) -> Tensor:
    """(H_kv * nb,) int32 how many slots of each block hold a token."""
    return stream.tokens_in_block().to(torch.int32).repeat(kv_heads)


def numbers(stream: Stream, count: int, step: int = 1) -> Tensor:
    """(count,) int32: 0, step, 2 * step ...; made once for all layers."""

    def compute() -> Tensor:
        return torch.arange(0, count * step, step, dtype=torch.int32, device=stream.device)

    return stream.cached(("numbers", count, step), compute)


def _spans(plan: Plan, stream: Stream) -> Spans:
    return Spans(plan.query, plan.key, ROWS, stream.block)


def _query_rows(rows: Tensor, plan: Plan) -> Tensor:
    """(H_kv, S, group, d) -> (P, group, d), as the operators take queries."""
    return rows.flatten(2).flatten(0, 1).index_select(0, plan.token).view(-1, *rows.shape[2:])


def _key_rows(rows: Tensor, plan: Plan, block: int) -> Tensor:
    """(H_kv, S, d) -> (N * block, 1, d)."""
    return rows.reshape(-1, block * rows.shape[-1]).index_select(0, plan.block).view(-1, 1, rows.shape[-1])


def forward(query: Tensor, key: Tensor, value: Tensor, plan: Plan, stream: Stream) -> tuple[Tensor, Tensor]:
    """Output (P, group, d) in the type of the queries and log-sum-exp (group, P), in sorted order."""
    return operators.forward(
        _query_rows(query, plan),
        _key_rows(key, plan, stream.block),
        _key_rows(value, plan, stream.block),
        _spans(plan, stream),
    )


def bag_sum(rows: Tensor, place: Tensor, stream: Stream, weights: Tensor | None = None) -> Tensor:
    """Back to tokens: sorted rows (P, group, d) -> (tokens * group, d), summed over a token's pairs.

    place (tokens, C); weights (..., group, C) of the tokens or None = 1. Sums are of `accumulation_dtype`, in
    a fixed order.
    """
    chosen, group = place.shape[1], rows.shape[1]
    if group > 1:
        place = torch.add(numbers(stream, group)[:, None], place[:, None], alpha=group)
    return torch.embedding_bag(
        rows.to(accumulation_dtype(rows.dtype)).flatten(0, 1),
        place.flatten(),
        numbers(stream, place.numel() // chosen, chosen),
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

    `grad` and `out` (H_kv, S, group, d) are of the whole softmax. `lse` (group, H_kv * S * C) is its
    log-sum-exp, for each pair; a huge one for what is no pair.
    """
    kv_heads, slots, _, dim = query.shape
    buckets = kv_heads * stream.num_blocks
    sorted_lse = torch.empty_like(lse).index_copy_(1, plan.place.flatten().long(), lse)
    to_query, *to_blocks = operators.backward(
        _query_rows(grad, plan),
        _query_rows(query, plan),
        _key_rows(key, plan, stream.block),
        _key_rows(value, plan, stream.block),
        _query_rows(out, plan),
        sorted_lse,
        _spans(plan, stream),
    )
    # a block's sequences follow each other: their gradients are summed in this order
    first = torch.searchsorted(plan.block, numbers(stream, buckets + 1), out_int32=True)
    to_key, to_value = (
        torch.embedding_bag(
            part.view(-1, stream.block * dim).to(accumulation_dtype(part.dtype)),
            numbers(stream, len(plan.block)),
            first,
            include_last_offset=True,
        )[0].view(kv_heads, slots, dim)
        for part in to_blocks
    )
    return bag_sum(to_query, plan.place, stream).view(query.shape), to_key, to_value
