"""The operators of flash attention on a CPU, slow and literal, under their own names and schemas.

`installed` registers them for CPU tensors, as the CUDA build of torch does for CUDA ones: same arguments,
same results, float64 where the inputs are. What the real ones leave undefined is NaN here, so that whoever
reads it is found out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def _mask(rows: int, columns: int, causal: bool, left: int | None, right: int | None) -> Tensor:
    """(rows, columns) True where open; the last row faces the last column."""
    place = torch.arange(columns) - (torch.arange(rows)[:, None] + columns - rows)
    left, right = -1 if left is None else left, -1 if right is None else right
    right = 0 if causal else right
    opened = torch.ones(rows, columns, dtype=torch.bool)
    if left >= 0:
        opened &= place >= -left
    if right >= 0:
        opened &= place <= right
    return opened


def _check(query: Tensor, key: Tensor, cum_q: Tensor, cum_k: Tensor, max_q: int, max_k: int) -> None:
    """What the CUDA operators check, and what they do not check but need."""
    for cum, longest, rows in ((cum_q, max_q, query), (cum_k, max_k, key)):
        assert cum.dtype == torch.int32
        assert cum.is_contiguous()
        lengths = cum.diff()
        assert int(cum[0]) == 0
        assert int(lengths.min()) >= 0
        assert int(cum[-1]) <= len(rows)
        assert int(lengths.max()) <= longest, "longer than max: its end would not be computed"
        assert rows.stride(-1) == 1
    assert len(cum_q) == len(cum_k)
    assert query.shape[1] % key.shape[1] == 0


def forward(
    query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None, seqused_k: None = None,
    alibi_slopes: None = None, block_table: None = None, num_splits: None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check(query, key, cum_seq_q, cum_seq_k, max_q, max_k)
    wide = torch.promote_types(query.dtype, torch.float32)
    out = torch.full_like(query, math.nan)
    lse = torch.full((query.shape[1], len(query)), math.nan, dtype=wide)
    group = query.shape[1] // key.shape[1]
    ends = zip(cum_seq_q.tolist(), cum_seq_q[1:].tolist(), cum_seq_k.tolist(), cum_seq_k[1:].tolist())  # noqa: B905
    for q0, q1, k0, k1 in ends:
        if q1 == q0:
            continue
        if k1 == k0:
            out[q0:q1], lse[:, q0:q1] = 0, math.inf
            continue
        q, k, v = (
            rows.transpose(0, 1).to(wide) for rows in (query[q0:q1], key[k0:k1], value[k0:k1])
        )  # (heads, length, d)
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        opened = _mask(q1 - q0, k1 - k0, is_causal, window_size_left, window_size_right)
        logits = logits.masked_fill(~opened, -math.inf)
        lse[:, q0:q1] = logits.logsumexp(-1)
        out[q0:q1] = (logits.softmax(-1) @ v).transpose(0, 1).to(query.dtype)
    return out, lse, query.new_empty(2, dtype=torch.uint64), query.new_empty(0), query.new_empty(0)


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
    cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
    rng_state: Tensor, unused: Tensor, *, scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check(query, key, cum_seq_q, cum_seq_k, max_q, max_k)
    assert torch.are_deterministic_algorithms_enabled(), "atomics would add up in any order"
    assert logsumexp.is_contiguous()
    assert logsumexp.shape == (query.shape[1], len(query))
    wide = torch.promote_types(query.dtype, torch.float32)
    to_query, to_key, to_value = (torch.full_like(rows, math.nan) for rows in (query, key, value))
    group, kv_heads = query.shape[1] // key.shape[1], key.shape[1]
    ends = zip(cum_seq_q.tolist(), cum_seq_q[1:].tolist(), cum_seq_k.tolist(), cum_seq_k[1:].tolist())  # noqa: B905
    for q0, q1, k0, k1 in ends:
        if k1 == k0 or q1 == q0:
            to_query[q0:q1], to_key[k0:k1], to_value[k0:k1] = 0, 0, 0
            continue
        g, q, o, k, v = (
            rows.transpose(0, 1).to(wide)
            for rows in (grad_out[q0:q1], query[q0:q1], out[q0:q1], key[k0:k1], value[k0:k1])
        )
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        factor = 1 / math.sqrt(q.shape[-1])
        opened = _mask(q1 - q0, k1 - k0, is_causal, window_size_left, window_size_right)
        logits = (q @ k.transpose(1, 2) * factor).masked_fill(~opened, -math.inf)
        weights = (logits - logsumexp[:, q0:q1, None]).exp()
        delta = (g * o).sum(-1, keepdim=True)
        slopes = weights * (g @ v.transpose(1, 2) - delta) * factor
        to_query[q0:q1] = (slopes @ k).transpose(0, 1).to(query.dtype)
        for total, part in (
            (to_key, slopes.transpose(1, 2) @ q),
            (to_value, weights.transpose(1, 2) @ g),
        ):
            total[k0:k1] = part.unflatten(0, (kv_heads, group)).sum(1).transpose(0, 1).to(key.dtype)
    return to_query, to_key, to_value


@contextmanager
def installed() -> Iterator[None]:
    """The stand-ins for CPU tensors inside; the real ones have no implementation there."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()
