"""The global route: every token reads its whole document, exactly or by routing.

In: queries (H, S, d), keys and values (H_kv, S, d) of a stream (see `layout`). Out: (H, S, d).
`full_attention` is o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s over the document; `global_attention` gives
the short documents to it and the long ones to `routed_attention` (see there for the mathematics).

The choice is made for each *document*, by its own number of blocks, never for the
batch. So a document gives the same result packed with others as alone, in every mode.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.attention.arguments import check_rows, check_whole
from dualroute.attention.backend import fast_kernels
from dualroute.attention.layout import Bucket, Stream, attend_by_length
from dualroute.attention.routed import Routing, routed_attention

# global_mode="auto" routes documents longer than this many tokens. In plain torch, which GPUs run, routed and
# full are equally fast there (whole training steps of the 5m preset, benchmarks/train_step.py). The C++
# kernels break even below 1024; but what a model reads must not depend on the kernels of a machine.
AUTO_BREAK_EVEN = 2048

GLOBAL_MODES = ("auto", "full", "routed")


def exact_blocks(mode: str, block: int, top_k: int) -> int | None:
    """Documents of at most this many blocks are attended to in full; None means all documents.

    A document of top_k + 2 blocks is read completely by every token (own block, sink, top_k): there routed
    attention *is* full attention, and the full kernel is faster. "auto" raises the limit to AUTO_BREAK_EVEN
    tokens.
    """
    everything_read = top_k + 2
    if mode == "full":
        return None
    if mode == "routed":
        return everything_read
    return max(everything_read, AUTO_BREAK_EVEN // block)


def global_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stream: Stream,
    *,
    routing: Routing,
    max_exact_blocks: int | None,
    causal: bool = True,
) -> Tensor:
    """Full attention in documents of at most `max_exact_blocks` blocks, routed in longer ones; (H, S, d).

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or does not fit the others.
    """
    check_rows(stream, query, key, value)
    if max_exact_blocks is not None:
        check_whole(0, max_exact_blocks=max_exact_blocks)
    if max_exact_blocks is None:
        return full_attention(query, key, value, stream, causal=causal)
    return attend_by_length(
        partial(full_attention, causal=causal),
        partial(routed_attention, routing=routing, causal=causal),
        query,
        key,
        value,
        stream,
        max_exact_blocks,
    )


def full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stream: Stream,
    *,
    causal: bool = True,
    window: int | None = None,
) -> Tensor:
    """Exact attention inside each document, (H, S, d): one SDPA call for all documents of equal size.

    Costs what the documents cost, and needs no mask when causal: what fills up a document lies after its
    tokens. `window` (causal only) hides older keys, at the full cost.

    On a CPU the kernels of the local route do it in float32 and float64, with a window that hides nothing:
    there they are faster than SDPA.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or does not fit the others.
    """
    check_rows(stream, query, key, value)
    if window is not None:
        check_whole(1, window=window)
    kernels = fast_kernels(query, causal=causal) if window is None else None
    if kernels is not None and hasattr(kernels, "faster_in_full") and kernels.faster_in_full(query):
        longest = max(bucket.blocks for bucket in stream.buckets) * stream.block
        return kernels.local_attention(query, key, value, stream, window=longest)
    if len(stream.buckets) == 1:
        return _bucket_attention(query, key, value, stream, stream.buckets[0], causal, window)
    sizes = [bucket.documents * bucket.blocks * stream.block for bucket in stream.buckets]
    parts = zip(*(rows.split(sizes, dim=1) for rows in (query, key, value)), strict=True)
    outputs = [
        _bucket_attention(q, k, v, stream, bucket, causal, window)
        for bucket, (q, k, v) in zip(stream.buckets, parts, strict=True)
    ]
    return torch.cat(outputs, dim=1)


def _bucket_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stream: Stream,
    bucket: Bucket,
    causal: bool,
    window: int | None,
) -> Tensor:
    shape = (bucket.documents, bucket.blocks * stream.block)
    q, k, v = (
        rows.unflatten(1, shape).transpose(0, 1) for rows in (query, key, value)
    )  # (documents, H, length, d)
    mask = None
    if not causal and stream.slot_valid is not None:
        begin = bucket.first_block * stream.block
        mask = stream.slot_valid[begin : begin + shape[0] * shape[1]].view(shape)[:, None, None]
    if window is not None and shape[1] > window:
        mask, causal = _window_mask(stream, shape[1], window), False
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=query.shape[0] != key.shape[0]
    )
    return out.transpose(0, 1).flatten(1, 2)


def _window_mask(stream: Stream, length: int, window: int) -> Tensor:
    """(length, length), True for the `window` keys up to the token itself; kept for all layers."""

    def compute() -> Tensor:
        mask = torch.ones(length, length, dtype=torch.bool, device=stream.device)
        return mask.tril_().triu_(1 - window)

    return stream.cached(("window", length, window), compute)
