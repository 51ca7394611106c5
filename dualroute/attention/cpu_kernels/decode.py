"""One token of a text: both routes of a layer, from its projections to the heads' outputs.

In: what the projections of the two routes give for the newest token of each text, not rotated yet; its
position; the layer's cache, which is written in place except for its lengths. Out: the heads of both routes
side by side.

The surprising fact: this is an operator of torch that tells what it mutates, so the program that
`torch.compile` makes of a whole step calls it. A layer's attention is one call, however long the text is.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dualroute.attention.cache import GlobalCache, KeysAndValues, LayerCache
from dualroute.attention.cpu_kernels.build import load
from dualroute.attention.cpu_kernels.operators import ROUTERS, compute_dtype

STORED = {
    torch.float64: (torch.float64,),
    torch.float32: (torch.float32, torch.int8),
    torch.bfloat16: (torch.bfloat16, torch.int8),
}  # what keys and values may be stored as, by the type of the model


def can_decode(rows: Tensor, cache: LayerCache) -> bool:
    """Whether `decode_layer` can take projections like `rows` and this cache."""
    parts = [part for part in (cache.global_cache, cache.local_cache) if part is not None]
    usable = STORED.get(rows.dtype, ())
    typed = (not isinstance(part, GlobalCache) or part.features.dtype == rows.dtype for part in parts)
    return all(part.keys.dtype in usable for part in parts) and all(typed)


def decode_layer(
    projected: Sequence[Tensor | None],
    table: tuple[Tensor, Tensor],
    cache: LayerCache,
    position: Tensor,
    *,
    head_dim: int,
    group: int,
    top_k: int,
) -> Tensor:
    """Both routes for one new token of each text, (B, H * d): the global heads, then the local ones.

    Args:
        projected: (B, (H + 2 H_kv) d) of the global and of the local route, None where there is none.
        table: cosines and sines of the position, d / 2 numbers each.
        cache: of B texts, with room for the token.
        position: () int64, the tokens before this one.
        head_dim, group: d, and query heads per key head.
        top_k: chosen blocks.
    """
    far, near = cache.global_cache, cache.local_cache
    routes = [None if part is None else part.contiguous() for part in projected]
    rows = next(part for part in routes if part is not None)
    cos, sin = (part.to(compute_dtype(rows)).flatten() for part in table)
    statistics = (None, None, None) if far is None else (far.features, far.far_keys, far.far_values)
    block, router = (1, 0) if far is None else (far.block, ROUTERS[far.router])
    sizes = [head_dim, group, block, router, top_k, int(cache.exact)]
    return torch.ops.dualroute.cpu_decode_layer(
        position, cos, sin, *routes, *_stored(far), *statistics, *_stored(near), sizes
    )


def _stored(part: KeysAndValues | None) -> tuple[Tensor | None, ...]:
    return (None,) * 4 if part is None else (part.keys, part.values, part.key_scales, part.value_scales)


_MUTATED = ", ".join(
    f"Tensor({letter}!)? {name}"
    for letter, name in zip(
        "abcdefghijk",
        (
            *("far_keys", "far_values", "far_key_scales", "far_value_scales"),
            *("features", "summary_keys", "summary_values"),
            *("near_keys", "near_values", "near_key_scales", "near_value_scales"),
        ),
        strict=True,
    )
)
torch.library.define(
    "dualroute::cpu_decode_layer",
    "(Tensor position, Tensor cos, Tensor sin, Tensor? global_rows, Tensor? local_rows, "
    f"{_MUTATED}, int[] sizes) -> Tensor",
)


@torch.library.impl("dualroute::cpu_decode_layer", "CPU")
def _decode_layer(
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    global_rows: Tensor | None,
    local_rows: Tensor | None,
    *rest: Any,
) -> Tensor:
    *stored, options = rest
    far_keys, features, summary_keys, near_keys = stored[0], stored[4], stored[5], stored[7]
    head_dim, group, block, router, top_k, exact = options
    rows = local_rows if global_rows is None else global_rows
    keys = near_keys if global_rows is None else far_keys
    assert rows is not None
    batch = len(rows)
    far_heads, far_tokens = (0, 1) if far_keys is None else (len(far_keys) // batch, far_keys.shape[1])
    near_heads, window = (0, 1) if near_keys is None else (len(near_keys) // batch, near_keys.shape[1])
    parts = 1 if features is None else features.shape[2]
    width = 0 if summary_keys is None else summary_keys.shape[-1]
    out = rows.new_empty(batch, (far_heads + near_heads) * group * head_dim)
    sizes = (batch, group, head_dim, torch.get_num_threads(), far_heads, far_tokens, block, top_k, exact)
    tensors = (position, cos, sin, global_rows, local_rows, *stored, out)
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    array = (*sizes, near_heads, window, parts, width, router, *pointers)
    _function(rows.dtype, keys.dtype)((ctypes.c_int64 * len(array))(*array))
    return out


@functools.cache
def _function(rows: torch.dtype, keys: torch.dtype) -> Any:
    return getattr(load(), "_".join(["decode_layer", *(str(each).split(".")[-1] for each in (rows, keys))]))


@torch.library.register_fake("dualroute::cpu_decode_layer")
def _(
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    global_rows: Tensor | None,
    local_rows: Tensor | None,
    *rest: Any,
) -> Tensor:
    head_dim, group = rest[-1][:2]
    routes = [rows for rows in (global_rows, local_rows) if rows is not None]
    heads = sum(rows.shape[1] // head_dim // (group + 2) * group for rows in routes)
    return routes[0].new_empty(len(routes[0]), heads * head_dim)
