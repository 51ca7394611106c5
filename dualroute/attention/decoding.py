"""The layer token by token: its caches, and what the next tokens of a text read from them.

In: a layer's `Projections`, hidden states (B, m, dim) of the next tokens of B texts of equal length, and the
`LayerCache` that holds what came before. Out: (B, m, dim), equal to what `layer` gives for these tokens in
one pass over the whole text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dualroute.attention.backend import choose, token_kernels
from dualroute.attention.backends.torch.decode import (
    decode_chunk,
    decode_full,
    decode_local,
    decode_step,
)
from dualroute.attention.core.cache import GlobalCache, LayerCache, LocalCache
from dualroute.attention.core.options import CACHE_DTYPES, check_at_least, check_name
from dualroute.attention.core.precision import outside_inference_mode, without_autocast
from dualroute.attention.core.rope import Table, token_tables
from dualroute.attention.core.routing import SharedChoice
from dualroute.attention.core.storage.paging import make_pages
from dualroute.attention.core.storage.quantized_cache import BITS, QuantizedGlobalCache
from dualroute.attention.projections import Projections


@outside_inference_mode
def new_cache(
    layer: Projections,
    batch_size: int,
    max_length: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    capacity: int | None = None,
    *,
    cache_dtype: str = "auto",
    cache_offload: str | Path | None = None,
) -> LayerCache:
    """An empty cache for texts of up to `max_length` tokens; device and dtype of the weights by default.

    There is room for all of them at once, or for `capacity` at first and for more when they come.
    `cache_dtype` is how the global route's complete blocks are kept: "auto" in `dtype`, "int8" or "int4" as
    integers (see `core.storage.quantized_cache`); the ring of the local route always is in `dtype`.
    `cache_offload` is a folder for files that hold the global route's keys and values, or "host" (see
    `core.storage.paging`); the room for all tokens is then reserved at once.

    Raises:
        ValueError: the layer is not causal, a size is below 1, cache_dtype is unknown, or cache_offload does
        not fit the device.
        OSError: the folder is missing or full.
    """
    if not layer.causal:
        raise ValueError("causal=False: a layer that reads both directions cannot be run token by token")
    check_at_least(1, batch_size=batch_size, max_length=max_length)
    check_name("cache_dtype", cache_dtype, CACHE_DTYPES)
    device = device or layer.out_proj.weight.device
    dtype = dtype or layer.out_proj.weight.dtype
    limit, routing = layer.max_exact_blocks, layer.routing
    global_cache: GlobalCache | None = None
    local_cache: LocalCache | None = None
    if layer.global_heads:
        shape: dict[str, Any] = {
            "rows": batch_size * layer.global_heads // layer.group,
            # room in pages is made below
            "capacity": 0 if cache_offload is not None else min(capacity or max_length, max_length),
            "head_dim": layer.head_dim,
            "block": layer.block,
            "router": routing.router,
            "sub_block": routing.sub_block,
            "far_summary": routing.far_summary,
            "cluster_span": routing.cluster_span,
            "device": device,
            "dtype": dtype,
        }
        if cache_dtype in BITS:
            global_cache = QuantizedGlobalCache(**shape, bits=BITS[cache_dtype])
        else:
            global_cache = GlobalCache(**shape)
        if cache_offload is not None:
            global_cache.offload(make_pages(cache_offload, torch.device(device)), max_length)
    if layer.local_heads:
        rows = batch_size * layer.local_heads // layer.group
        local_cache = LocalCache(rows, layer.window, layer.head_dim, device, dtype)
    exact = limit is None or -(-max_length // layer.block) <= limit
    return LayerCache(batch_size, max_length, exact, global_cache, local_cache)


def share_choices(caches: Sequence[LayerCache], top_k: int) -> None:
    """Have these layers' caches of the same texts read the blocks that the first of them chooses; its routing
    has this top_k, as that of the others has."""
    choice = SharedChoice(top_k)
    for number, cache in enumerate(caches):
        if cache.global_cache is not None:
            cache.global_cache.choice, cache.global_cache.follows = choice, number > 0


def share_again(caches: Sequence[LayerCache]) -> None:
    """Of copies of caches, which go on for themselves: give each group of layers a choice of its own."""
    fresh: dict[int, SharedChoice] = {}
    for cache in caches:
        far = cache.global_cache
        if far is not None and far.choice is not None:
            far.choice = fresh.setdefault(id(far.choice), SharedChoice(far.choice.top_k))


def check_cache(cache: LayerCache, batch: int, length: int) -> None:
    """Whether `length` more tokens of `batch` texts fit.

    Raises:
        ValueError: they do not.
    """
    if batch != cache.batch_size:
        raise ValueError(f"the cache is for batch_size={cache.batch_size}, hidden_states have {batch} rows")
    if cache.length + length > cache.max_length:
        raise ValueError(
            f"the cache holds {cache.length} of max_length={cache.max_length} tokens, "
            f"{length} more do not fit: make a new one with a larger max_length"
        )


def decode(layer: Projections, hidden_states: Tensor, positions: Tensor | None, cache: LayerCache) -> Tensor:
    """The next tokens, (B, m, dim), after those in the cache."""
    far = cache.global_cache
    if far is None or not far.cluster_span or cache.exact:
        return _decode(layer, hidden_states, positions, cache)
    outputs, begin, count = [], 0, hidden_states.shape[1]
    while begin < count:  # a token reads what those before it have completed
        cache.regroup()
        part = slice(begin, begin + far.block - far.length % far.block)
        places = None if positions is None else positions[..., part]
        outputs.append(_decode(layer, hidden_states[:, part], places, cache))
        begin = part.stop
    return torch.cat(outputs, dim=1)


def _decode(layer: Projections, hidden_states: Tensor, positions: Tensor | None, cache: LayerCache) -> Tensor:
    """Tokens that have the same order of what is past."""
    batch, count, _ = hidden_states.shape
    projected = _projected(layer, hidden_states)
    if count == 1 and positions is None and not torch.is_grad_enabled():
        token = _decode_token(layer, [None if part is None else part[:, 0] for part in projected], cache)
        if token is not None:
            return layer.combine(token[:, None], hidden_states)
    if positions is None:
        positions = cache.length + torch.arange(count, device=hidden_states.device)
    return layer.combine(
        _decode_tokens(layer, projected, positions.expand(batch, count), cache), hidden_states
    )


def row_tables(layer: Projections, caches: Sequence[LayerCache], dtype: torch.dtype) -> list[Table]:
    """Of `decode_rows`, the same for all layers of a model."""
    ropes = (layer.global_rope, layer.local_rope)
    return [token_tables(ropes, torch.tensor(cache.length), dtype) for cache in caches]


def decode_rows(
    layer: Projections, hidden_states: Tensor, caches: Sequence[LayerCache], tables: Sequence[Table]
) -> Tensor:
    """The next token of each of B texts, (B, dim), each after those in a cache of its own, of any length.

    The layer's weights are read once for all of them. No gradients. `tables`: of `row_tables`.
    """
    projected = _projected(layer, hidden_states)
    heads = []
    for number, cache in enumerate(caches):
        cache.regroup()
        own = [None if part is None else part[number : number + 1] for part in projected]
        token = _decode_token(layer, own, cache, tables[number])
        if token is None:
            position = torch.full((1, 1), cache.length, device=hidden_states.device)
            wide = [None if part is None else part[:, None] for part in own]
            token = _decode_tokens(layer, wide, position, cache)[:, 0]
        heads.append(token)
    return layer.combine(torch.cat(heads)[:, None], hidden_states[:, None])[:, 0]


def _projected(layer: Projections, hidden_states: Tensor) -> list[Tensor | None]:
    """(…, (H + 2 H_kv) * d) of the global and of the local route, None where there is none."""
    routes = (layer.global_qkv, layer.local_qkv)
    return [None if route is None else route(hidden_states) for route in routes]


def _decode_tokens(
    layer: Projections, projected: Sequence[Tensor | None], positions: Tensor, cache: LayerCache
) -> Tensor:
    """The heads, (B, m, H * d), of tokens at `positions` (B, m) after those in the cache, by torch."""
    batch, count = positions.shape
    (far, near), outputs = projected, []
    dtype = next(part for part in projected if part is not None).dtype
    far_table, near_table = layer.rotary_tables(positions.flatten(), dtype)
    if far is not None and cache.global_cache is not None:
        query, key, value = _heads(layer, far, far_table)
        top_k = layer.routing.top_k
        outputs.append(_global_tokens(query, key, value, cache.global_cache, top_k, cache.exact))
    if near is not None and cache.local_cache is not None:
        query, key, value = _heads(layer, near, near_table)
        outputs.append(_decode_local(query, key, value, cache.local_cache))
    heads = [out.view(batch, -1, count, layer.head_dim).transpose(1, 2).flatten(2) for out in outputs]
    return torch.cat(heads, dim=-1)


def _global_tokens(
    query: Tensor, key: Tensor, value: Tensor, cache: GlobalCache, top_k: int, exact: bool
) -> Tensor:
    """The global route of m new tokens, which the cache is given: (R, group, m, d).

    A quantised cache has floats of the newest block alone, so it gets and gives a block at a time.
    """
    count = key.shape[1]
    if cache.choice is not None and not cache.follows:
        cache.choice.forget()
    ends = [count]
    if cache.bits:
        ends = [*range(cache.block - cache.length % cache.block, count, cache.block), count]
    outputs = []
    for begin, end in itertools.pairwise((0, *ends)):
        cache.append(key[:, begin:end], value[:, begin:end])
        outputs.append(decode_global(query[:, :, begin:end], cache, top_k, exact))
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


@without_autocast
def decode_global(query: Tensor, cache: GlobalCache, top_k: int, exact: bool) -> Tensor:
    """The global route of the newest m tokens, (R, group, m, d) with R = batch * H_kv, whose keys are in the
    cache. `exact`: they read everything."""
    if exact or (cache.length - 1) // cache.block <= top_k + 1:  # every block is own, sink or selected
        return decode_full(query, cache)
    if query.shape[2] > 1:
        return decode_chunk(query, cache, top_k)
    # the kernels have no gradients, and read floats where the queries are
    if torch.is_grad_enabled() or cache.bits or cache.pages is not None:
        return decode_step(query, cache, top_k)
    return choose(query, block=cache.block).decode_step(query, cache, top_k)


_decode_local = without_autocast(decode_local)


def _decode_token(
    layer: Projections, projected: Sequence[Tensor | None], cache: LayerCache, tables: Table | None = None
) -> Tensor | None:
    """The heads of one new token of each text, (B, H * d), of projected rows; None without kernels."""
    rows = next(part for part in projected if part is not None)
    kernels = token_kernels(rows)
    if kernels is None or not kernels.can_decode(rows, cache):
        return None
    position = torch.tensor(cache.length)
    if cache.global_cache is not None:
        cache.global_cache.reserve(cache.length + 1)
    if tables is None:
        tables = token_tables((layer.global_rope, layer.local_rope), position, rows.dtype)
    heads = token_heads(layer, kernels, projected, tables, kernels.cache_memory([cache]), 0, position)
    for part in (cache.global_cache, cache.local_cache):
        if part is not None:
            part.advance()
    return heads


def token_heads(
    layer: Projections,
    kernels: ModuleType,
    projected: Sequence[Tensor | None],
    tables: Table,
    memory: Tensor,
    number: int,
    position: Tensor,
) -> Tensor:
    """The heads of one new token of each text, (B, H * d), by `kernels` of `backend.token_kernels`.

    Args:
        projected: (B, (H + 2 H_kv) * d) of the global and the local projection, None where there is none.
        tables: `rope.token_tables` of both routes, the global one's first.
        memory, number: the kernels' `cache_memory`, and the row of it that is this layer's; the cache is
            written in place, except for its lengths; its room must suffice.
        position: () int64, the number of tokens before this one.
    """
    rows = [None if part is None else _normalised_rows(layer, part) for part in projected]
    return kernels.decode_layer(
        rows,
        tables,
        memory,
        number,
        position,
        head_dim=layer.head_dim,
        group=layer.group,
        top_k=layer.routing.top_k,
    )


def _normalised_rows(layer: Projections, rows: Tensor) -> Tensor:
    """Projected rows (B, (H + 2 H_kv) * d) with queries and keys normalised, if the layer does that."""
    if layer.query_norm is None:
        return rows
    return torch.cat(layer.split_heads(rows), dim=1).flatten(1)


def _heads(layer: Projections, projected: Tensor, table: Table | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B * H_kv, group, m, d), keys and values (B * H_kv, m, d) of (B, m, (H + 2 H_kv) * d)."""
    batch, count = projected.shape[:2]
    parts = layer.rotated_heads(projected.flatten(0, 1), table)  # (H, B * m, d)
    query, key, value = (rows.unflatten(1, (batch, count)).transpose(0, 1) for rows in parts)  # (B, H, m, d)
    return query.reshape(-1, layer.group, count, layer.head_dim), key.flatten(0, 1), value.flatten(0, 1)
