"""A decoding step whose shapes never change, so that a compiler can make one program of it.

In: query, key and value of one new token, (R, group, d) and (R, d) with R = batch * kv_heads, its position as
a tensor, and the caches of `cache`, whose tensors are written in place. Out: (R, group, d), what the
functions of `decode` give for that token; the routed step is the same one.

What those slice by the length of the text is read whole here, up to a fixed size, and masked: keys behind the
position, blocks from the own one on, slots of the ring that hold nothing yet.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dualroute.attention.backends.torch.decode import routed_step
from dualroute.attention.core.cache import GlobalCache, LocalCache
from dualroute.attention.core.precision import NEG_INF, accumulation_dtype


def static_local(query: Tensor, key: Tensor, value: Tensor, cache: LocalCache, position: Tensor) -> Tensor:
    """The local route of one token, (R, group, d); the cache is written, its `length` is not."""
    cache.write((position % cache.window).view(1), key[:, None], value[:, None])
    filled = torch.arange(cache.window, device=query.device) <= position
    wide = accumulation_dtype(query.dtype)
    keys, values = cache.keys.to(wide), cache.values.to(wide)
    return _weighted(_logits(query, keys).masked_fill(~filled, NEG_INF), values, query.dtype)


def static_full(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: GlobalCache,
    position: Tensor,
    size: int,
    statistics: bool,
) -> Tensor:
    """The global route where every key is read; `size` > position is how many are looked at.

    `statistics`: keep those of the blocks, which a longer text will be routed by.
    """
    cache.put_token(key, value, position, statistics=statistics)
    seen = torch.arange(size, device=query.device) <= position
    keys, values = cache.read_first(size, position // cache.block, accumulation_dtype(query.dtype))
    return _weighted(_logits(query, keys).masked_fill(~seen, NEG_INF), values, query.dtype)


def static_routed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: GlobalCache,
    position: Tensor,
    size: int,
    top_k: int,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The global route where sink, own block and top_k chosen ones are read exactly, and the chosen ones, as
    `routed_step` gives them.

    `size` > position, a multiple of the block, is how many tokens' statistics are looked at; `chosen` are the
    blocks of another layer, to be read here too.
    """
    cache.put_token(key, value, position, statistics=True)
    out, chosen = routed_step(query[:, :, None], cache, top_k, position, size // cache.block, chosen)
    return out[:, :, 0], chosen


def _logits(query: Tensor, keys: Tensor) -> Tensor:
    """(R, group, d) by (R, s, d) -> (R, group, s), in float32 for half precision."""
    wide = query.to(accumulation_dtype(query.dtype)) / math.sqrt(query.shape[-1])
    return wide @ keys.to(wide.dtype).transpose(-1, -2)


def _weighted(logits: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    weights = logits.softmax(-1)
    return (weights @ values.to(weights.dtype)).to(dtype)
