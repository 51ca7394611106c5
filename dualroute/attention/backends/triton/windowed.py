"""Kernels of attention to a window inside a range of slots: the local route, and the gradients of own blocks.

In: queries (H, S, d), keys and values (H_kv, S, d), and for each slot the `begin` and `end` (S,) of the range
that it may see. Out: output and log-sum-exp, or gradients given those of a softmax that may be larger.

Slot t sees slot s when |t - s| < window (causal: 0 <= t - s < window), begin_t <= s < end_t and t < end_t;
and always itself, so that no row is empty. The range is the document for the local route; for the own blocks
of `routed` it is the block.

The loops run over slots, not over blocks of a mask. A tile begins at the first slot its
first row may see and ends at the last, so what lies outside of the window is not even looked at.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualroute.attention.backends.triton.gradients import (
    key_logit_gradients,
    load_softmax,
    logit_gradients,
    poison,
)
from dualroute.attention.backends.triton.tiles import (
    LN_2,
    LOG2_E,
    LOG_2_E,
    dot,
    load_rows,
    pad_dim,
    softmax_step,
    store_rows,
    tile_for,
)


@triton.jit
def slots_in_sight(row, begin, end, window, CAUSAL: tl.constexpr):
    """(rows,) first and last slot that each row sees, of the range begin..end-1 (rows,) that is its own."""
    low = tl.maximum(begin, row - window + 1)
    high = row
    if not CAUSAL:
        high = tl.minimum(end - 1, row + window - 1)
    empty = row >= end
    return tl.where(empty, row, low), tl.where(empty, row, high)


@triton.jit
def keys_in_sight(first_row, last_row, begin, end, window, CAUSAL: tl.constexpr):
    """First and last + 1 slot that any of the rows first_row..last_row-1 sees."""
    first = tl.maximum(tl.min(begin), first_row - window + 1)
    last = last_row
    if not CAUSAL:
        last = tl.maximum(last_row, tl.minimum(tl.max(end), last_row - 1 + window))
    return first, last


@triton.jit
def forward_kernel(
    query_rows, key_rows, value_rows,  # (H, S, DIM), (H_kv, S, DIM) twice
    value_poison,  # (H_kv, S), see `poison`
    begin_slot, end_slot,  # (S,)
    out_rows, lse_rows,  # (H, S, DIM), (H, S), written
    slots, window, scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of ROWS queries, H). o = softmax(q k^T / sqrt(d)) v over what is seen."""
    head = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(0) * ROWS
    last_row = tl.minimum(first_row + ROWS, slots)
    row = first_row + tl.arange(0, ROWS)
    row_mask = row < slots
    begin = tl.load(begin_slot + row, mask=row_mask, other=slots)
    end = tl.load(end_slot + row, mask=row_mask, other=0)
    query = load_rows(query_rows + head * slots * DIM, row, row_mask, DIM, DIM_PAD, DIM)
    key_rows += (head // GROUP) * slots * DIM
    value_rows += (head // GROUP) * slots * DIM
    value_poison += (head // GROUP) * slots

    total = tl.zeros((ROWS, DIM_PAD), tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    first, last = keys_in_sight(first_row, last_row, begin, end, window, CAUSAL)
    low, high = slots_in_sight(row, begin, end, window, CAUSAL)
    for key_begin in range(first, last, KEYS):
        slot = key_begin + tl.arange(0, KEYS)
        keys = load_rows(key_rows, slot, slot < last, DIM, DIM_PAD, DIM)
        poison = tl.load(value_poison + slot, mask=slot < last, other=float("nan"))
        values = load_rows(value_rows, slot, poison == 0.0, DIM, DIM_PAD, DIM)
        seen = (slot[None, :] >= low[:, None]) & (slot[None, :] <= high[:, None])
        logits = dot(query, tl.trans(keys)) * scale + poison[None, :]
        total, peak, norm = softmax_step(total, peak, norm, tl.where(seen, logits, float("-inf")), values)

    norm = tl.where(row_mask, norm, 1.0)
    store_rows(out_rows + head * slots * DIM, row, row_mask, total / norm[:, None], DIM, DIM_PAD, DIM)
    tl.store(lse_rows + head * slots + row, (peak + tl.log2(norm)) * LN_2, mask=row_mask)


@triton.jit
def query_gradient_kernel(
    grad_rows, query_rows, key_rows, value_rows,  # (H, S, DIM) twice, (H_kv, S, DIM) twice
    lse_rows, delta_rows, key_poison,  # (H, S) twice, (H_kv, S), see `poison`
    begin_slot, end_slot,  # (S,)
    grad_query,  # (H, S, DIM), written
    slots, window, scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of ROWS queries, H). dQ = dS K / sqrt(d)."""
    head = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(0) * ROWS
    last_row = tl.minimum(first_row + ROWS, slots)
    row = first_row + tl.arange(0, ROWS)
    row_mask = row < slots
    begin = tl.load(begin_slot + row, mask=row_mask, other=slots)
    end = tl.load(end_slot + row, mask=row_mask, other=0)
    query = load_rows(query_rows + head * slots * DIM, row, row_mask, DIM, DIM_PAD, DIM)
    grad = load_rows(grad_rows + head * slots * DIM, row, row_mask, DIM, DIM_PAD, DIM)
    lse, delta = load_softmax(lse_rows + head * slots, delta_rows + head * slots, row, row_mask)
    key_rows += (head // GROUP) * slots * DIM
    value_rows += (head // GROUP) * slots * DIM
    key_poison += (head // GROUP) * slots

    total = tl.zeros((ROWS, DIM_PAD), tl.float32)
    first, last = keys_in_sight(first_row, last_row, begin, end, window, CAUSAL)
    low, high = slots_in_sight(row, begin, end, window, CAUSAL)
    for key_begin in range(first, last, KEYS):
        slot = key_begin + tl.arange(0, KEYS)
        poison = tl.load(key_poison + slot, mask=slot < last, other=float("nan"))
        keys = load_rows(key_rows, slot, poison == 0.0, DIM, DIM_PAD, DIM)
        values = load_rows(value_rows, slot, slot < last, DIM, DIM_PAD, DIM)
        seen = (slot[None, :] >= low[:, None]) & (slot[None, :] <= high[:, None])
        _, grad_logits = logit_gradients(query, keys, values, grad, lse, delta, seen, scale * LOG_2_E)
        total += dot(grad_logits.to(keys.dtype), keys)
    store_rows(grad_query + head * slots * DIM, row, row_mask, total * scale, DIM, DIM_PAD, DIM)


@triton.jit
def key_gradient_kernel(
    grad_rows, query_rows, key_rows, value_rows,  # (H, S, DIM) twice, (H_kv, S, DIM) twice
    lse_rows, delta_rows,  # (H, S)
    begin_slot, end_slot,  # (S,)
    more_key, more_value,  # (H_kv, S, DIM) float32, added when ADD
    grad_key, grad_value,  # (H_kv, S, DIM), written
    slots, window, scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, ADD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of KEYS keys, H_kv). dK = dS^T Q / sqrt(d), dV = P^T dO, summed over the query heads."""
    kv_head = tl.program_id(1).to(tl.int64)
    first_key = tl.program_id(0) * KEYS
    slot = first_key + tl.arange(0, KEYS)
    key_mask = slot < slots
    keys = load_rows(key_rows + kv_head * slots * DIM, slot, key_mask, DIM, DIM_PAD, DIM)
    values = load_rows(value_rows + kv_head * slots * DIM, slot, key_mask, DIM, DIM_PAD, DIM)
    to_key = tl.zeros((KEYS, DIM_PAD), tl.float32)
    to_value = tl.zeros((KEYS, DIM_PAD), tl.float32)
    if ADD:
        to_key = load_rows(more_key + kv_head * slots * DIM, slot, key_mask, DIM, DIM_PAD, DIM) / scale
        to_value = load_rows(more_value + kv_head * slots * DIM, slot, key_mask, DIM, DIM_PAD, DIM)

    # Rows that see a key are as far away as keys that a row sees.
    begin = tl.load(begin_slot + slot, mask=key_mask, other=slots)
    end = tl.load(end_slot + slot, mask=key_mask, other=0)
    last_key = tl.minimum(first_key + KEYS, slots)
    last = tl.maximum(last_key, tl.minimum(tl.max(end), last_key - 1 + window))
    first = first_key
    low, high = slot, tl.minimum(end - 1, slot + window - 1)
    if not CAUSAL:
        first = tl.minimum(first_key, tl.maximum(tl.min(begin), first_key - window + 1))
        low = tl.maximum(begin, slot - window + 1)
    low, high = tl.where(slot >= end, slot, low), tl.where(slot >= end, slot, high)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for row_begin in range(first, last, ROWS):
            row = row_begin + tl.arange(0, ROWS)
            lse, delta = load_softmax(lse_rows + head * slots, delta_rows + head * slots, row, row < last)
            sound = (row < last) & (tl.abs(delta) < float("inf"))  # else lse or delta hands on a NaN
            query = load_rows(query_rows + head * slots * DIM, row, sound, DIM, DIM_PAD, DIM)
            grad = load_rows(grad_rows + head * slots * DIM, row, sound, DIM, DIM_PAD, DIM)
            seen = (row[None, :] >= low[:, None]) & (row[None, :] <= high[:, None]) & (row < last)[None, :]
            weights, grad_logits = key_logit_gradients(
                query, keys, values, grad, lse, delta, seen, scale * LOG_2_E
            )
            to_value += dot(weights.to(grad.dtype), grad)
            to_key += dot(grad_logits.to(query.dtype), query)

    store_rows(grad_key + kv_head * slots * DIM, slot, key_mask, to_key * scale, DIM, DIM_PAD, DIM)
    store_rows(grad_value + kv_head * slots * DIM, slot, key_mask, to_value, DIM, DIM_PAD, DIM)


def forward(
    query: Tensor, key: Tensor, value: Tensor, begin: Tensor, end: Tensor, window: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output (H, S, d) and float32 log-sum-exp (H, S); contiguous inputs, shapes as in the kernels."""
    heads, slots, dim = query.shape
    out = torch.empty_like(query)
    lse = torch.empty(heads, slots, dtype=torch.float32, device=query.device)
    tile = tile_for("window", dim, query.dtype)
    forward_kernel[(triton.cdiv(slots, tile.rows), heads)](
        query, key, value, poison(value), begin, end, out, lse,
        slots, min(window, slots), LOG2_E / math.sqrt(dim),
        GROUP=heads // len(key), CAUSAL=causal,
        DIM=dim, DIM_PAD=pad_dim(dim), ROWS=tile.rows, KEYS=tile.columns,
        num_warps=tile.warps, num_stages=2,
    )  # fmt: skip
    return out, lse


def query_gradient(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, delta: Tensor,
    begin: Tensor, end: Tensor, window: int, causal: bool,
) -> Tensor:  # fmt: skip
    """(H, S, d) from grad = d loss / d output; `lse` and `delta` (H, S) are those of the whole softmax."""
    heads, slots, dim = query.shape
    grad_query = torch.empty_like(query)
    tile = tile_for("window_query", dim, query.dtype)
    query_gradient_kernel[(triton.cdiv(slots, tile.rows), heads)](
        grad, query, key, value, lse, delta, poison(key), begin, end, grad_query,
        slots, min(window, slots), 1 / math.sqrt(dim),
        GROUP=heads // len(key), CAUSAL=causal,
        DIM=dim, DIM_PAD=pad_dim(dim), ROWS=tile.rows, KEYS=tile.columns,
        num_warps=tile.warps, num_stages=2,
    )  # fmt: skip
    return grad_query


def key_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, delta: Tensor,
    begin: Tensor, end: Tensor, window: int, causal: bool, more: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(H_kv, S, d) of keys and values, plus the float32 gradients `more` from other parts of the softmax."""
    heads, slots, dim = query.shape
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    more_key, more_value = more if more is not None else (grad_key, grad_value)
    tile = tile_for("window_key", dim, query.dtype)
    key_gradient_kernel[(triton.cdiv(slots, tile.columns), len(key))](
        grad, query, key, value, lse, delta, begin, end, more_key, more_value, grad_key, grad_value,
        slots, min(window, slots), 1 / math.sqrt(dim),
        GROUP=heads // len(key), CAUSAL=causal, ADD=more is not None,
        DIM=dim, DIM_PAD=pad_dim(dim), ROWS=tile.rows, KEYS=tile.columns,
        num_warps=tile.warps, num_stages=2,
    )  # fmt: skip
    return grad_key, grad_value
