"""Attention of new tokens to a cache: what one step, or one chunk of a prefill, reads.

In: queries (R, group, m, d) of the m newest tokens, whose keys are already in the global cache, with R =
batch * kv_heads. Out: (R, group, m, d), equal to what the routes give for these tokens in a forward pass
over the whole text.

One token gathers the few blocks it reads, but a chunk of tokens masks all of them.
Chunks come from prefills, which are short or start at 0 (where the routes themselves run); gathering per
token would only copy.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.attention.backend import fast_kernels
from dualroute.attention.cache import GlobalCache, LocalCache
from dualroute.attention.far_summary import far_query_features
from dualroute.attention.kernels import NEG_INF, accumulation_dtype
from dualroute.attention.router import block_scores, top_blocks

QUERY_CHUNK = 128  # tokens of a chunk that are masked at once


def token_kernels(rows: Tensor) -> ModuleType | None:
    """Kernels that take one new token of each text through both routes at once, or None.

    They write the caches on the way, and have no gradients.
    """
    kernels = fast_kernels(rows)
    return kernels if hasattr(kernels, "decode_layer") else None


def decode_global(query: Tensor, cache: GlobalCache, top_k: int, exact: bool) -> Tensor:
    """The global route of the newest m tokens, (R, group, m, d)."""
    count = query.shape[2]
    if exact or (cache.length - 1) // cache.block <= top_k + 1:  # every block is own, sink or selected
        return _decode_full(query, cache)
    if count == 1:
        usable = not torch.is_grad_enabled() and not cache.is_int8  # the kernels read floats
        kernels = fast_kernels(query, block=cache.block) if usable else None
        return getattr(kernels, "decode_step", _decode_step)(query, cache, top_k)
    begin = cache.length - count
    chunks = [
        _decode_chunk(query[:, :, first : first + QUERY_CHUNK], cache, top_k, begin + first)
        for first in range(0, count, QUERY_CHUNK)
    ]
    return torch.cat(chunks, dim=2)


def _decode_full(query: Tensor, cache: GlobalCache) -> Tensor:
    count, total = query.shape[2], cache.length
    keys, values = cache.read(lambda rows: rows[:, None, :total], query.dtype)
    mask = None
    if (
        count > 1
    ):  # token i of the chunk sees the total - count tokens before the chunk, and i + 1 of the chunk
        mask = torch.ones(count, total, dtype=torch.bool, device=query.device).tril(total - count)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


def _selection(query: Tensor, cache: GlobalCache, top_k: int, begin: int) -> Tensor:
    """(R, m, k) blocks chosen by the tokens at begin, begin + 1, ..., -1 = none; never block 0, the sink."""
    count = query.shape[2]
    own = (begin + torch.arange(count, device=query.device)) // cache.block
    last = (begin + count - 1) // cache.block  # candidates are the blocks 1 .. last - 1
    scores = block_scores(query, cache.features[:, 1:last], cache.router)
    allowed = torch.arange(1, last, device=query.device) < own[:, None]
    chosen = top_blocks(scores, allowed, top_k)
    return torch.where(chosen < 0, -1, chosen + 1)


def _far_logits(query: Tensor, cache: GlobalCache, last: int) -> Tensor | None:
    """(R, group, m, last - 1) logits of the pseudo-keys of blocks 1 .. last - 1; None without summary."""
    if cache.far_keys is None:
        return None
    features = far_query_features(query, cache.far_keys.shape[-1])
    keys = cache.far_keys[:, None, 1:last].to(features.dtype)
    return features @ keys.transpose(-1, -2) + math.log(cache.block)


def _softmax_sum(parts: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """One softmax over the logits (R, group, m, s_i) of several parts, times their values (R, 1, s_i, d)."""
    weights = torch.cat([logits for logits, _ in parts], dim=-1).softmax(-1)
    pieces = weights.split([logits.shape[-1] for logits, _ in parts], dim=-1)
    return sum(w @ values.to(w.dtype) for w, (_, values) in zip(pieces, parts, strict=True)).to(dtype)


def _decode_step(query: Tensor, cache: GlobalCache, top_k: int) -> Tensor:
    """One token: gathers the sink and the chosen blocks. Past blocks are complete, so nothing is masked."""
    own = (cache.length - 1) // cache.block
    chosen = _selection(query, cache, top_k, cache.length - 1)[:, 0]  # (R, k)
    none = chosen < 0  # where no score was a number
    read = F.pad(chosen.clamp_min(0), (1, 0))  # and block 0, the sink
    rows = torch.arange(len(query), device=query.device)[:, None]
    own_tokens = slice(own * cache.block, cache.length)

    def gather(tokens: Tensor) -> Tensor:
        blocks = tokens.unflatten(1, (-1, cache.block))[rows, read].flatten(1, 2)
        return torch.cat([blocks, tokens[:, own_tokens]], dim=1)[:, None]  # (R, 1, s, d)

    wide = query.to(accumulation_dtype(query.dtype))
    keys, values = cache.read(gather, wide.dtype)
    logits = wide @ keys.transpose(-1, -2) / math.sqrt(query.shape[-1])  # (R, group, 1, s)
    of_chosen = logits[..., cache.block : read.shape[1] * cache.block].unflatten(-1, (-1, cache.block))
    of_chosen.masked_fill_(none[:, None, None, :, None], NEG_INF)
    parts = [(logits, values)]
    far = _far_logits(query, cache, own)
    if far is not None and cache.far_values is not None:
        column = torch.where(none, own - 1, chosen - 1)[:, None, None].expand(-1, far.shape[1], 1, -1)
        far = F.pad(far, (0, 1)).scatter_(-1, column, NEG_INF)[..., :-1]  # one more for those that are none
        parts.append((far, cache.far_values[:, None, 1:own]))
    return _softmax_sum(parts, query.dtype)


def _decode_chunk(query: Tensor, cache: GlobalCache, top_k: int, begin: int) -> Tensor:
    """Several tokens, the first at position `begin`: every past token is scored and masked."""
    rows, _, count, dim = query.shape
    end, block = begin + count, cache.block
    position = begin + torch.arange(count, device=query.device)[:, None]
    last = (end - 1) // block
    # (R, m, blocks) whether a block is read exactly
    read = torch.zeros(rows, count, last + 2, dtype=torch.bool, device=query.device)
    chosen = _selection(query, cache, top_k, begin)
    read.scatter_(-1, torch.where(chosen < 0, last + 1, chosen), True)
    read = read[..., : last + 1]
    read[..., 0] = True
    read = read | (torch.arange(last + 1, device=query.device) == position // block)

    wide = query.to(accumulation_dtype(query.dtype))
    keys, values = cache.read(lambda rows: rows[:, None, :end], wide.dtype)
    visible = read.repeat_interleave(block, dim=-1)[..., :end]
    visible = visible & (torch.arange(end, device=query.device) <= position)
    logits = wide @ keys.transpose(-1, -2) / math.sqrt(dim)
    parts = [(logits.masked_fill_(~visible[:, None], NEG_INF), values)]
    far = _far_logits(query, cache, last)
    if far is not None and cache.far_values is not None:
        past = torch.arange(1, last, device=query.device) < position // block
        far.masked_fill_((read[..., 1:last] | ~past)[:, None], NEG_INF)
        parts.append((far, cache.far_values[:, None, 1:last]))
    return _softmax_sum(parts, query.dtype)


def decode_local(query: Tensor, keys: Tensor, values: Tensor, cache: LocalCache) -> Tensor:
    """The local route of m new tokens, (R, group, m, d); adds keys and values (R, m, d) to the cache."""
    count = query.shape[2]
    if count == 1:
        cache.append(keys, values)
        filled = min(cache.length, cache.window)  # in the order of the ring: a softmax does not mind
        past_keys, past_values = cache.read(lambda rows: rows[:, None, :filled], query.dtype)
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
