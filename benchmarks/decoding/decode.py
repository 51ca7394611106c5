"""One step of decoding: time, bytes read and size of the cache, DualRouting against a dense cache.

    python benchmarks/decoding/decode.py --lengths 4096 16384 65536 131072

Batch 1, random keys. Dense reads all keys of `--heads` heads with torch's scaled_dot_product_attention;
DualRouting has half of them on each route, and also rotates and stores the token. A figure is the median of
steps that take turns, projections left out. Bytes are those of the keys, values and block statistics that one
step reads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dualroute.attention import DualRouting
from dualroute.attention.backend import token_kernels
from dualroute.attention.backends.torch.decode import decode_local
from dualroute.attention.core.cache import GlobalCache, LayerCache
from dualroute.attention.core.rope import token_tables
from dualroute.attention.decoding import decode_global, token_heads

sys.path.insert(0, str(Path(__file__).parents[1]))  # where measure.py is
from measure import medians, prepare, show


def filled_cache(layer: DualRouting, length: int, device: torch.device, dtype: torch.dtype) -> LayerCache:
    """A cache that holds `length` random tokens and has room for one more block."""
    cache = layer.new_cache(1, length + layer.block, device, dtype)
    assert cache.global_cache is not None
    assert cache.local_cache is not None
    for part in (cache.global_cache, cache.local_cache):
        rows = len(part.keys)
        for begin in range(0, length, 8192):
            size = (rows, min(8192, length - begin), layer.head_dim)
            part.append(
                torch.randn(size, device=device, dtype=dtype), torch.randn(size, device=device, dtype=dtype)
            )
    return cache


def cache_bytes(cache: LayerCache) -> int:
    """Bytes of every tensor that a layer's cache keeps."""
    tensors = [value for part in (cache.global_cache, cache.local_cache) for value in vars(part).values()]
    return sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))


def bytes_read(cache: GlobalCache, window: int, top_k: int) -> int:
    """Bytes that one step reads: statistics of past blocks, the read blocks, half of the own, the window."""
    blocks = cache.length // cache.block
    token = cache.keys[:, 0].nbytes + cache.values[:, 0].nbytes
    statistics = sum(
        part[:, 0].nbytes for part in (cache.features, cache.far_keys, cache.far_values) if part is not None
    )
    exact = (top_k + 1) * cache.block + cache.block // 2
    return statistics * blocks + token * (exact + window)


def token_step(
    layer: DualRouting, cache: LayerCache, device: torch.device, dtype: torch.dtype
) -> Callable[[], Any]:
    """One token through both routes, as `DualRouting` takes it there: by kernels, where there are some."""
    length = cache.length
    rows = torch.randn(1, 3 * layer.global_heads * layer.head_dim, device=device, dtype=dtype)
    kernels = token_kernels(rows)
    if kernels is not None:
        position = torch.tensor(length)
        tables = token_tables((layer.global_rope, layer.local_rope), position, dtype)
        memory = kernels.cache_memory([cache])
        return partial(token_heads, layer, kernels, [rows, rows], tables, memory, 0, position)
    far, near = cache.global_cache, cache.local_cache
    assert far is not None
    assert near is not None
    query = torch.randn(layer.global_heads, 1, 1, layer.head_dim, device=device, dtype=dtype)

    def step() -> None:
        decode_global(query, far, layer.routing.top_k, exact=False)
        decode_local(query, query[:, 0], query[:, 0], near)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--top_k", type=int, default=4)
    parser.add_argument("--router", default="minmax")
    parser.add_argument("--far_summary", default="second_order")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="folder for the CSV")
    options = parser.parse_args()
    device = prepare(options.threads, options.device)
    dtype = getattr(torch, options.dtype)
    layer = DualRouting(
        options.heads * options.head_dim,
        options.heads,
        window=options.window,
        block=options.block,
        top_k=options.top_k,
        router=options.router,
        far_summary=options.far_summary,
        global_mode="routed",
    )
    rows = []
    for length in options.lengths:
        cache = filled_cache(layer, length, device, dtype)
        far = cache.global_cache
        assert far is not None
        wide = torch.randn(1, options.heads, 1, options.head_dim, device=device, dtype=dtype)
        keys = torch.randn(1, options.heads, length, options.head_dim, device=device, dtype=dtype)
        values = torch.randn_like(keys)

        dense = partial(F.scaled_dot_product_attention, wide, keys, values)
        with torch.inference_mode():
            dual = token_step(layer, cache, device, dtype)
            times = medians({"dense": dense, "dual": dual}, options.repeats, device)
        dense_bytes = keys.nbytes + values.nbytes
        read = bytes_read(far, options.window, options.top_k)
        rows.append(
            {
                "tokens": f"{length:,}",
                "dense us": f"{times['dense'] * 1e6:.0f}",
                "dual us": f"{times['dual'] * 1e6:.0f}",
                "ratio": f"{times['dense'] / times['dual']:.2f}",
                "dense MiB read": f"{dense_bytes / 2**20:.1f}",
                "dual MiB read": f"{read / 2**20:.2f}",
                "fewer bytes": f"{dense_bytes / read:.1f}",
                "cache / dense": f"{cache_bytes(cache) / dense_bytes:.3f}",
            }
        )
    title = f"{options.heads} heads, window/block/top_k {options.window}/{options.block}/{options.top_k}"
    show(title, rows, options.output, "decode")


if __name__ == "__main__":
    main()
