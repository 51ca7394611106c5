"""Compile every kernel that the package launches, for a GPU that need not be there, and launch none.

    python -m tests.attention.backends.triton.compile_kernels "80 bfloat16 64 64 1 512 1" …
                                               capability  dtype  head_dim block group tokens decode

prints a JSON object per launch: the sizes, the kernel and what its machine code uses. Runs without
TRITON_INTERPRET. Each of several sizes gets a copy of the process, since a kernel remembers what it became.

The ordinary functions are called, on tensors of the CPU. So what is compiled is exactly
what they would launch, with their types, constants and sizes of tiles.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from benchmarks.machine_code import Kernel, compiled
from dualroute.attention import Layout, Routing
from dualroute.attention.backends.triton import decode_step, local_attention, routed_attention
from dualroute.attention.core.cache import GlobalCache


def launch_everything(
    dtype: torch.dtype, dim: int, block: int, group: int, length: int, decode: int, causal: int = 1
) -> None:
    """Both ways of both routes, with the default router and summary; if asked, a step of decoding."""
    stream = Layout.build(1, length, block).stream
    query, key, value = (
        torch.randn(heads, stream.num_slots, dim, dtype=dtype, requires_grad=True) for heads in (group, 1, 1)
    )
    sub_block = min(block, 16)
    out = routed_attention(query, key, value, stream, Routing(4, sub_block=sub_block), causal=bool(causal))
    out = out + local_attention(query, key, value, stream, window=max(1, length // 4), causal=bool(causal))
    out.backward(torch.ones_like(out))
    if not decode:
        return
    cache = GlobalCache(1, max(length, 3), dim, block, "minmax", sub_block, "second_order", "cpu", dtype)
    with torch.no_grad():
        cache.append(key, value)
        cache.length = max(length, 3)  # so that there is something to choose
        decode_step(query[None, :, :1], cache, 4)


def describe(kernel: Kernel, hopper: bool) -> dict[str, object]:
    """What a budget can be set for; what needs the disassembler, for a Hopper GPU only."""
    known: dict[str, object] = {"name": kernel.name, "shared": kernel.shared, "spills": kernel.spills}
    if hopper:
        known |= {"registers": kernel.resources["REG"], "matrix": kernel.matrix, "wgmma": kernel.wgmma}
        known |= {"loops": [loop.size for loop in kernel.loops()]}
    return known


def show(given: str) -> None:
    capability, dtype, *sizes = given.split()
    with compiled(int(capability)) as found:
        launch_everything(getattr(torch, dtype), *(int(size) for size in sizes))
    for kernel in found:
        print(json.dumps({"sizes": given, **describe(kernel, capability == "90")}), flush=True)


def main() -> None:
    for given in sys.argv[1:]:
        child = os.fork()
        if not child:
            show(given)
            return
        if os.waitpid(child, 0)[1]:
            sys.exit(f"no kernels for {given}")


if __name__ == "__main__":
    main()
