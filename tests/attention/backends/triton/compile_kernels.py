"""Compile every kernel that the package launches, for a GPU that need not be there, and launch none.

    python -m tests.attention.backends.triton.compile_kernels 80 bfloat16 64 64 1 512
                                                    capability  dtype  head_dim block group tokens

prints a line per launch: the kernel and its bytes of shared memory. Runs without TRITON_INTERPRET.

The ordinary functions are called, on tensors of the CPU. So what is compiled is exactly
what they would launch, with their types, constants and sizes of tiles.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dualroute.attention import Layout, Routing
from dualroute.attention.backends.triton import decode_step, local_attention, routed_attention
from dualroute.attention.core.cache import GlobalCache


class _AbsentGPU:
    """Answers the questions a launch asks before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiled(capability: int) -> Iterator[list[tuple[str, Any]]]:
    """Names and compiled kernels of what is launched inside; capability 80 = A100, 90 = H100."""
    found: list[tuple[str, Any]] = []
    run = JITFunction.run

    def only_compile(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.fn.__name__, kernel))

    driver.set_active(_AbsentGPU(GPUTarget("cuda", capability, 32)))
    JITFunction.run = only_compile
    try:
        yield found
    finally:
        JITFunction.run = run


def launch_everything(dtype: torch.dtype, dim: int, block: int, group: int, length: int) -> None:
    """Forward and backward of both routes, and a step of decoding, with the default router and summary."""
    stream = Layout.build(1, length, block).stream
    query, key, value = (
        torch.randn(heads, stream.num_slots, dim, dtype=dtype, requires_grad=True) for heads in (group, 1, 1)
    )
    sub_block = min(block, 16)
    out = routed_attention(query, key, value, stream, Routing(4, sub_block=sub_block))
    out = out + local_attention(query, key, value, stream, window=max(1, length // 4))
    out.backward(torch.ones_like(out))
    cache = GlobalCache(1, max(length, 3), dim, block, "minmax", sub_block, "second_order", "cpu", dtype)
    with torch.no_grad():
        cache.append(key, value)
        cache.length = max(length, 3)  # so that there is something to choose
        decode_step(query[None, :, :1], cache, 4)


def main() -> None:
    capability, dtype, *sizes = sys.argv[1:]
    with compiled(int(capability)) as found:
        launch_everything(getattr(torch, dtype), *(int(size) for size in sizes))
    for name, kernel in found:
        print(name, kernel.metadata.shared)


if __name__ == "__main__":
    main()
