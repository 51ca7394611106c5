"""Attention of new tokens to a cache: what one step, or one chunk of a prompt, reads.

In: queries (R, group, m, d) of the m newest tokens, whose keys are already in the global cache, with R =
batch * kv_heads. Out: (R, group, m, d), equal to what the routes give for these tokens in a forward pass
over the whole text.

One token gathers the few blocks it reads, a chunk those that any of its tokens reads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.attention.core.cache import GlobalCache, LocalCache
from dualroute.attention.core.joint_softmax import Past, joint_softmax
from dualroute.attention.core.precision import NEG_INF, accumulation_dtype
from dualroute.attention.core.router import block_scores, top_blocks

QUERY_CHUNK = 128  # tokens of a chunk that are masked at once
STEP = "step"  # the newest token, in a `SharedChoice`; those of a chunk go by the place of the first


def decode_full(query: Tensor, cache: GlobalCache) -> Tensor:
    """Every key of the text, for the newest m tokens: (R, group, m, d)."""
    count, total = query.shape[2], cache.length
    keys, values = (rows[:, None] for rows in cache.read_first(total, cache.own, query.dtype))
    mask = None
    if (
        count > 1
    ):  # token i of the chunk sees the total - count tokens before the chunk, and i + 1 of the chunk
        mask = torch.ones(count, total, dtype=torch.bool, device=query.device).tril(total - count)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


def decode_step(query: Tensor, cache: GlobalCache, top_k: int) -> Tensor:
    """The routed route of the newest token, (R, group, 1, d)."""
    position, choice = cache.length - 1, cache.choice
    chosen = choice.get(STEP) if choice is not None and cache.follows else None
    out, chosen = routed_step(query, cache, top_k, position, position // cache.block + 1, chosen)
    if choice is not None and not cache.follows:
        choice.put(STEP, chosen)
    return out


def routed_step(
    query: Tensor,
    cache: GlobalCache,
    top_k: int,
    position: int | Tensor,
    blocks: int,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The routed route of one token, (R, group, 1, d), whose key is in the cache, and the blocks (R, k) that
    were chosen for it, -1 = none.

    Args:
        query: (R, group, 1, d).
        position: its place in the text: a number, or a tensor () of which no operator's shape may depend.
        blocks: how many blocks are looked at; more than position // block.
        chosen: the blocks, where another layer has chosen them.
    """
    block, rows = cache.block, len(query)
    own = position // block
    number = torch.arange(1, blocks, device=query.device)  # candidates; block 0, the sink, is read anyway
    if chosen is None:
        scores = block_scores(query, cache.router_features(1, blocks), cache.router)[:, 0]  # (R, blocks - 1)
        best = _first_best if isinstance(position, Tensor) else top_blocks
        chosen = best(scores, number < own, top_k)
        chosen = torch.where(chosen < 0, -1, chosen + 1)  # (R, k)

    last = own.expand(rows, 1) if isinstance(own, Tensor) else chosen.new_full((rows, 1), own)
    read = torch.cat([torch.zeros_like(last), chosen.clamp_min(0), last], dim=1)  # (R, k + 2)
    closed = torch.cat([last == 0, chosen < 0, torch.zeros_like(last, dtype=torch.bool)], dim=1)
    token = read[..., None] * block + torch.arange(block, device=query.device)  # (R, k + 2, block)
    hidden = (closed[..., None] | (token > position)).flatten(1)
    keys, values = cache.read_blocks(read, accumulation_dtype(query.dtype))
    exact = (chosen[..., None] == number).any(1)  # (R, blocks - 1)
    far_keys, far_values = (
        None if part is None else part[:, 1:blocks] for part in (cache.far_keys, cache.far_values)
    )
    past = Past(keys, values, far_keys, far_values, block)
    return joint_softmax(query, past, hidden[:, None], (exact | (number >= own))[:, None]), chosen


def _first_best(scores: Tensor, allowed: Tensor, top_k: int) -> Tensor:
    """What `top_blocks` gives, by a stable sort: it takes the first of equal ones, and asks for no number."""
    best, order = torch.sort(
        scores.to(torch.float32).masked_fill(~allowed, NEG_INF), dim=-1, descending=True, stable=True
    )
    return torch.where(best > NEG_INF, order, -1)[:, :top_k]


def decode_chunk(query: Tensor, cache: GlobalCache, top_k: int) -> Tensor:
    """The routed route of the newest m tokens, (R, group, m, d): every past block is scored."""
    count = query.shape[2]
    begin = cache.length - count
    chunks = [
        _decode_chunk(query[:, :, first : first + QUERY_CHUNK], cache, top_k, begin + first)
        for first in range(0, count, QUERY_CHUNK)
    ]
    return torch.cat(chunks, dim=2)


def _decode_chunk(query: Tensor, cache: GlobalCache, top_k: int, begin: int) -> Tensor:
    """Several tokens, the first at position `begin`."""
    rows, _, count, _ = query.shape
    end, block = begin + count, cache.block
    position = begin + torch.arange(count, device=query.device)
    own = position[:, None] // block
    blocks = (end - 1) // block + 1
    number = torch.arange(blocks, device=query.device)
    # (R, m, blocks + 1) whether a block is read exactly; the last column takes the "-1 = none" entries
    read = torch.zeros(rows, count, blocks + 1, dtype=torch.bool, device=query.device)
    choice = cache.choice
    chosen = choice.get(begin) if choice is not None and cache.follows else None
    if chosen is None:
        scores = block_scores(query, cache.router_features(1, blocks - 1), cache.router)
        chosen = top_blocks(scores, number[1:-1] < own, top_k)
        if choice is not None:
            choice.put(begin, chosen)
    read.scatter_(-1, torch.where(chosen < 0, blocks, chosen + 1), True)
    read = read[..., :blocks] | (number == own) | (number == 0)
    # what any of these tokens reads, in the order of the text: the rest need not be looked at
    used = read.any(1)  # (R, nb)
    most = int(used.sum(1).max())
    order = used.to(torch.int8).argsort(dim=1, stable=True)
    numbers = order[:, -most:]  # (R, most), the newest own block last
    keys, values = cache.read_blocks(numbers, accumulation_dtype(query.dtype))
    token = (numbers[..., None] * block + torch.arange(block, device=query.device)).flatten(1)  # (R, s)
    visible = read.gather(2, numbers[:, None].expand(-1, count, -1)).repeat_interleave(block, dim=2)
    hidden = ~visible | (token[:, None] > position[:, None])  # (R, m, s)
    far_keys, far_values = (
        None if part is None else part[:, :blocks] for part in (cache.far_keys, cache.far_values)
    )
    past = Past(keys, values, far_keys, far_values, block)
    return joint_softmax(query, past, hidden, read | (number >= own))


def decode_local(query: Tensor, keys: Tensor, values: Tensor, cache: LocalCache) -> Tensor:
    """The local route of m new tokens, (R, group, m, d); adds keys and values (R, m, d) to the cache."""
    count = query.shape[2]
    if count == 1:
        cache.append(keys, values)
        filled = min(cache.length, cache.window)  # in the order of the ring: a softmax does not mind
        past_keys, past_values = (
            rows[:, None, :filled].to(query.dtype) for rows in (cache.keys, cache.values)
        )
        return F.scaled_dot_product_attention(query, past_keys, past_values, enable_gqa=True)
    before = min(cache.length, cache.window - 1)
    past_keys, past_values = cache.last(before, keys.dtype)
    cache.append(keys, values)
    keys = torch.cat([past_keys, keys], dim=1)[:, None]
    values = torch.cat([past_values, values], dim=1)[:, None]
    outputs = []
    for first in range(0, count, QUERY_CHUNK):
        end = min(first + QUERY_CHUNK, count)
        seen = slice(max(0, first + before - cache.window + 1), end + before)
        distance = torch.arange(first, end, device=query.device)[:, None] + before
        distance = distance - torch.arange(seen.start, seen.stop, device=query.device)
        mask = (distance >= 0) & (distance < cache.window)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, first:end], keys[:, :, seen], values[:, :, seen], attn_mask=mask, enable_gqa=True
            )
        )
    return torch.cat(outputs, dim=2)
