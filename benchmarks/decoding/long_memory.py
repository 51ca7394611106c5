"""Resident memory and time of decoding at lengths up to a million tokens, caches in memory or in a file.

    python benchmarks/decoding/long_memory.py --cache_dtype int4 --cache_offload /tmp

Each length is a process of its own: the cache of one layer is filled with random keys and values in pieces,
then `--steps` tokens are decoded, each through both routes. `peak` is the most resident memory of that
process above what it had before the cache was made; `dense` is what keys and values of as many dense heads
take.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from dualroute.attention import DualRouting

sys.path.insert(0, str(Path(__file__).parents[1]))  # where measure.py is
from measure import show

PIECE = 4096  # tokens that are made at once


def resident() -> int:
    """Bytes of memory that this process holds now, and not at its peak."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def one_length(options: argparse.Namespace, length: int) -> dict[str, float]:
    """Bytes and seconds at one length, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = DualRouting(
        options.heads * options.head_dim, options.heads, block=64, top_k=4, global_mode="routed"
    )
    row = torch.randn(1, 1, layer.out_proj.weight.shape[0])
    with torch.inference_mode():
        layer(row, cache=(warm := layer.new_cache(1, 2)))
        layer(row, cache=warm)  # by the kernels, which are loaded now
    before, most = resident(), 0
    begin = time.process_time()
    cache = layer.new_cache(
        1, length + options.steps, cache_dtype=options.cache_dtype, cache_offload=options.cache_offload
    )
    assert cache.global_cache is not None
    assert cache.local_cache is not None
    with torch.inference_mode():
        for part in (cache.global_cache, cache.local_cache):
            while part.length < length:
                size = (layer.global_heads, min(PIECE, length - part.length), layer.head_dim)
                part.append(torch.randn(size), torch.randn(size))
                most = max(most, resident())
        filled = time.process_time() - begin
        begin = time.process_time()
        for _ in range(options.steps):
            layer(row, cache=cache)
            most = max(most, resident())
        taken = time.process_time() - begin
    return {"peak": most - before, "fill": filled, "step": taken / options.steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[65536, 262144, 1048576])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--cache_dtype", default="auto", choices=("auto", "int8", "int4"))
    parser.add_argument("--cache_offload", help="folder for the file")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--alone", type=int, help="this length only, in this process, as JSON")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(one_length(options, options.alone)))
        return
    rows = []
    for length in options.lengths:
        command = [sys.executable, *sys.argv, "--alone", str(length)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(printed.splitlines()[-1])
        dense = 2 * 4 * options.heads * options.head_dim * length
        rows.append(
            {
                "tokens": f"{length:,}",
                "peak MiB": f"{found['peak'] / 2**20:.0f}",
                "dense MiB": f"{dense / 2**20:.0f}",
                "CPU us a step": f"{found['step'] * 1e6:.0f}",
            }
        )
    show(f"{options.cache_dtype}, cache_offload {options.cache_offload}", rows, None, "long_memory")


if __name__ == "__main__":
    main()
