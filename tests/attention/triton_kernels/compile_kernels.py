"""Compile every kernel that a call launches, to machine code for a GPU that is not there, and launch none.

`compiled(target)` is a context: inside it tensors stay on the CPU, launches only compile, and the list it
yields fills with what the compiler says. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


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
