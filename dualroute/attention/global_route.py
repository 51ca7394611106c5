"""The global route: every token reads its whole document, exactly or by routing.

In: queries (H, S, d), keys and values (H_kv, S, d) of a stream (see `layout`). Out: (H, S, d).
`full_attention` is o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s over the document; `global_attention` gives
the short documents to it and the long ones to `routed_attention` (see there for the mathematics).

The surprising fact: the choice is made for each *document*, by its own number of blocks, never for the
batch. So a document gives the same result packed with others as alone, in every mode.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.attention.layout import Bucket, Stream
from dualroute.attention.routed import Routing, routed_attention

# global_mode="auto" routes documents longer than this many tokens. Measured as whole training steps of the 5m
# preset on two CPU cores (benchmarks/train_step.py): routed and full are equal at 2048 tokens; at 4096 routed
# is 1.2 times as fast in float32 and 1.1 times in bfloat16.
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
    """Full attention in documents of at most `max_exact_blocks` blocks, routed in longer ones; (H, S, d)."""
    if max_exact_blocks is None:
        return full_attention(query, key, value, stream, causal=causal)
    short, long = stream.split(max_exact_blocks)
    sizes = [short.num_slots, long.num_slots]
    if sizes[1] == 0:
        return full_attention(query, key, value, short, causal=causal)
    if sizes[0] == 0:
        return routed_attention(query, key, value, long, routing, causal=causal)
    q, k, v = (rows.split(sizes, dim=1) for rows in (query, key, value))
    return torch.cat(
        [
            full_attention(q[0], k[0], v[0], short, causal=causal),
            routed_attention(q[1], k[1], v[1], long, routing, causal=causal),
        ],
        dim=1,
    )


def full_attention(
    query: Tensor, key: Tensor, value: Tensor, stream: Stream, *, causal: bool = True
) -> Tensor:
    """Exact attention inside each document, (H, S, d): one SDPA call for all documents of equal size.

    Costs what the documents cost, and needs no mask when causal: what fills up a document lies after its
    tokens.
    """
    sizes = [bucket.documents * bucket.blocks * stream.block for bucket in stream.buckets]
    parts = zip(*(rows.split(sizes, dim=1) for rows in (query, key, value)), strict=True)
    outputs = [
        _bucket_attention(q, k, v, stream, bucket, causal)
        for bucket, (q, k, v) in zip(stream.buckets, parts, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _bucket_attention(
    query: Tensor, key: Tensor, value: Tensor, stream: Stream, bucket: Bucket, causal: bool
) -> Tensor:
    shape = (bucket.documents, bucket.blocks * stream.block)
    q, k, v = (
        rows.unflatten(1, shape).transpose(0, 1) for rows in (query, key, value)
    )  # (documents, H, length, d)
    mask = None
    if not causal and stream.slot_valid is not None:
        begin = bucket.first_block * stream.block
        mask = stream.slot_valid[begin : begin + shape[0] * shape[1]].view(shape)[:, None, None]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=query.shape[0] != key.shape[0]
    )
    return out.transpose(0, 1).flatten(1, 2)
