"""The choice of blocks: which blocks each token reads, among the complete past blocks of its document.

In: queries (H, S, d) and keys (H_kv, S, d) of a stream, detached. Out: `select_blocks` gives (H_kv, S, 1 +
top_k) block numbers of the stream, -1 = none; column 0 is the sink, the first block of the document.
`routed` reads them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualroute.attention.backends.torch.device import at_once, least_ranges
from dualroute.attention.core.layout import Bucket, Stream, query_chunks
from dualroute.attention.core.router import block_features, block_scores, top_blocks

MAX_SCORES = 1 << 22  # scores held at once: bounds the memory of the router


@torch.no_grad()
def select_blocks(
    query: Tensor,
    key: Tensor,
    stream: Stream,
    *,
    top_k: int,
    router: str = "minmax",
    sub_block: int = 16,
    causal: bool = True,
) -> Tensor:
    """(H_kv, S, 1 + top_k) int32 blocks of the stream: the sink, then the chosen ones; -1 = none.

    A token's own block is never among them, and slots without a token choose nothing. Not causal, the
    candidates are all other blocks of the document.
    """
    kv_heads, slots, _ = key.shape
    selected = torch.full((kv_heads, slots, 1 + top_k), -1, dtype=torch.int32, device=key.device)
    grouped = query.unflatten(0, (kv_heads, -1))  # (H_kv, group, S, d)
    valid = stream.slot_valid.view(-1, stream.block) if stream.slot_valid is not None and not causal else None
    features = block_features(key.unflatten(1, (-1, stream.block)), router, sub_block, valid)
    for bucket in stream.buckets:
        _select_in_bucket(selected, grouped, features, bucket, stream, top_k, router, causal)
    if stream.copies:
        copies = stream.hidden_blocks()[0].bool().repeat_interleave(stream.block)
        selected.masked_fill_(copies[:, None], -1)
    if stream.slot_valid is not None:
        selected.masked_fill_(~stream.slot_valid[:, None], -1)
    return selected


def _select_in_bucket(
    selected: Tensor,
    query: Tensor,
    features: Tensor,
    bucket: Bucket,
    stream: Stream,
    top_k: int,
    router: str,
    causal: bool,
) -> None:
    kv_heads, group, _, dim = query.shape
    block = stream.block
    first, documents, blocks = bucket
    part = slice(first * block, (first + documents * blocks) * block)
    out = selected[:, part].view(kv_heads, documents, blocks, block, 1 + top_k)
    query = query[:, :, part].view(kv_heads, group, documents, blocks, block, dim)
    features = features[:, first : first + documents * blocks].unflatten(1, (documents, blocks))
    base = first + blocks * torch.arange(documents, device=query.device).view(
        -1, 1, 1, 1
    )  # first block of each
    out[:, :, 1:, :, 0] = base[..., 0].to(torch.int32)  # the sink: read by every token outside of it
    if top_k == 0:
        return
    parts = features.shape[3]
    cost = kv_heads * documents * block * blocks * parts
    device = query.device
    for begin, end in query_chunks(blocks, cost, at_once(MAX_SCORES, device), least_ranges(device)):
        candidates = slice(1, end - 1 if causal else blocks)  # the sink is read anyway
        count = candidates.stop - 1
        if count < 1:
            continue
        own = torch.arange(begin, end, device=query.device).repeat_interleave(block)[:, None]  # (rows, 1)
        block_number = torch.arange(1, candidates.stop, device=query.device)
        allowed = block_number < own if causal else block_number != own  # (rows, count)
        if stream.copies:
            allowed &= ~stream.hides(bucket, own, block_number)
        if count <= top_k:
            chosen = torch.where(allowed, block_number - 1, -1)
        else:
            scores = block_scores(query[:, :, :, begin:end].flatten(3, 4), features[:, :, candidates], router)
            chosen = top_blocks(scores, allowed, top_k)
        number = (chosen + 1 + base[..., 0]).masked_fill_(chosen < 0, -1).to(torch.int32)
        out[:, :, begin:end, :, 1 : 1 + number.shape[-1]] = number.unflatten(-2, (end - begin, block))
