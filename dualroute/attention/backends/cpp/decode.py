"""One token of a text: both routes of a layer, from its projections to the heads' outputs.

In: what the projections of the two routes give for the newest token of each text, not rotated yet; its
position; where the caches lie in memory, which are written except for their lengths. Out: the heads of both
routes side by side.

This is an operator of torch that is given no cache, but the addresses of all. The
program that `torch.compile` makes of a whole step then has three inputs instead of a dozen for each layer,
which would take longer to hand over than a short text takes to read. One program does for every cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dualroute.attention.backends.cpp.operators import ROUTERS
from dualroute.attention.core.cache import LayerCache
from dualroute.attention.core.storage.quantized_cache import QuantizedGlobalCache

TYPES = (torch.float64, torch.float32, torch.bfloat16)


def can_decode(rows: Tensor, cache: LayerCache) -> bool:
    """Whether `decode_layer` can take projections like `rows` and this cache."""
    if rows.dtype not in TYPES:
        return False
    far, near = cache.global_cache, cache.local_cache
    kept = [] if near is None else [near.keys.dtype]
    if isinstance(far, QuantizedGlobalCache):
        kept.append(far.tail_keys.dtype)
    elif far is not None:
        kept += [far.keys.dtype, far.features.dtype]
    return all(dtype == rows.dtype for dtype in kept)


def cache_memory(caches: Sequence[LayerCache]) -> Tensor:
    """(L, 24) int64: where the tensors of the caches of L layers lie, and their sizes; see `CacheMemory`.

    It holds until one of them grows, is put in another order or is freed: whoever keeps it, keeps them.
    """
    return torch.tensor([_addresses(cache) for cache in caches])


def _addresses(cache: LayerCache) -> list[int]:
    far, near = cache.global_cache, cache.local_cache
    far_sizes, near_sizes = [0, 1, 1, 0, 1, 0], [0, 1]
    kept: list[Tensor | None] = [None] * 11
    if far is not None:
        kept[:2], kept[4:7] = (far.keys, far.values), (far.features, far.far_keys, far.far_values)
        parts, width = far.features.shape[2], 0 if far.far_keys is None else far.far_keys.shape[-1]
        far_sizes = [*far.keys.shape[:2], far.block, ROUTERS[far.router], parts, width]
    if isinstance(far, QuantizedGlobalCache):
        kept[7:] = far.key_grids, far.value_grids, far.tail_keys, far.tail_values
    if near is not None:
        kept[2:4] = near.keys, near.values
        near_sizes = [*near.keys.shape[:2]]
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in kept]
    bits = 0 if far is None else far.bits or 0
    choice = [0, 0, 0]
    if far is not None and far.choice is not None:
        chosen = far.choice.memory(len(far.keys))
        choice = [chosen.data_ptr(), chosen.shape[1], int(far.follows)]
    return [*pointers, *far_sizes, *near_sizes, int(cache.exact), bits, *choice]


def decode_layer(
    projected: Sequence[Tensor | None],
    tables: tuple[Tensor, Tensor],
    memory: Tensor,
    layer: int,
    position: Tensor,
    *,
    head_dim: int,
    group: int,
    top_k: int,
) -> Tensor:
    """Both routes for one new token of each text, (B, H * d): the global heads, then the local ones.

    Args:
        projected: (B, (H + 2 H_kv) d) of the global and of the local route, None where there is none.
        tables: cosines and sines (2, d / 2) of the position for the global and the local route, in
            `compute_dtype`.
        memory, layer: `cache_memory` of caches of B texts with room for the token, and which of them.
        position: () int64, the tokens before this one.
        head_dim, group: d, and query heads per key head.
        top_k: chosen blocks.
    """
    routes = [None if part is None else part.contiguous() for part in projected]
    return torch.ops.dualroute.decode_layer(position, *tables, *routes, memory, layer, head_dim, group, top_k)


torch.library.define(
    "dualroute::decode_layer",
    "(Tensor position, Tensor cos, Tensor sin, Tensor? global_rows, Tensor? local_rows, Tensor memory, "
    "int layer, int head_dim, int group, int top_k) -> Tensor",
)  # implemented in torch_ops.h


@torch.library.register_fake("dualroute::decode_layer")
def _(
    position: Tensor, cos: Tensor, sin: Tensor, global_rows: Tensor | None, local_rows: Tensor | None,
    memory: Tensor, layer: int, head_dim: int, group: int, top_k: int,
) -> Tensor:  # fmt: skip
    routes = [rows for rows in (global_rows, local_rows) if rows is not None]
    heads = sum(rows.shape[1] // head_dim // (group + 2) * group for rows in routes)
    return routes[0].new_empty(len(routes[0]), heads * head_dim)
