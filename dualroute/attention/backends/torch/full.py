"""Full attention: every token reads its whole document.

In: queries (H, S, d), keys and values (H_kv, S, d) of a stream (see `layout`). Out: (H, S, d),
o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s over the document.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.attention.backends.torch.device import is_cpu
from dualroute.attention.core.layout import Bucket, Stream


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
    """
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
    grouped = query.shape[0] != key.shape[0]
    if grouped and mask is not None and not is_cpu(query.device):
        # on a GPU only the kernel that holds all length x length logits takes grouped heads behind a mask
        k, v = (rows.repeat_interleave(q.shape[1] // rows.shape[1], dim=1) for rows in (k, v))
        grouped = False
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(0, 1).flatten(1, 2)


def _window_mask(stream: Stream, length: int, window: int) -> Tensor:
    """(length, length), True for the `window` keys up to the token itself; kept for all layers."""

    def compute() -> Tensor:
        mask = torch.ones(length, length, dtype=torch.bool, device=stream.device)
        return mask.tril_().triu_(1 - window)

    return stream.cached(("window", length, window), compute)
