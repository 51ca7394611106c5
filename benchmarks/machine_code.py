"""The Triton kernels as machine code for a GPU that need not be there: what they use, what their loops hold.

In: a compute capability (80 = A100, 90 = H100, 100 = B200) and the ordinary functions, called on tensors of
the CPU. Out: one `Kernel` per launch, in the order of the launches; nothing runs. The disassembler comes with
the package `triton`.

What is compiled is exactly what would be launched, with its types, constants and sizes of tiles.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHORTEST_LOOP = 12  # instructions; what is shorter waits for something
LIMIT_S = 120


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


@dataclass
class Body:
    """Some instructions of a kernel, those of loops inside not counted."""

    instructions: list[str]

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, instruction) is not None for instruction in self.instructions)

    @property
    def size(self) -> int:
        return len(self.instructions)


@dataclass
class Kernel:
    """A compiled launch."""

    name: str
    constants: dict[str, Any]
    binary: bytes
    shared: int  # bytes
    warps: int

    @cached_property
    def resources(self) -> dict[str, int]:
        """Per thread: REG(isters), STACK and LOCAL bytes, which are what was spilled."""
        text = _tool("cuobjdump", "-res-usage", self.binary)
        return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}

    @cached_property
    def instructions(self) -> tuple[list[str], dict[str, int]]:
        """All instructions, and the position of each label."""
        found: list[str] = []
        labels = {}
        for line in _tool("nvdisasm", "-c", self.binary).splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(found)
            elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                found.append(instruction[1])
        return found, labels

    def count(self, pattern: str) -> int:
        return Body(self.instructions[0]).count(pattern)

    @property
    def spills(self) -> int:
        """Bytes of stack and local memory."""
        return self.resources["STACK"] + self.resources["LOCAL"]

    @property
    def wgmma(self) -> int:
        return self.count("HGMMA")

    @property
    def matrix(self) -> bool:
        """Whether it multiplies matrices, by whichever instruction."""
        return self.count(r"HGMMA|HMMA|UTC.?MMA") > 0

    def loops(self) -> list[Body]:
        """Loop bodies in the order of their beginnings, outer before inner."""
        spans = self._loop_spans()
        return [Body(self._without(begin, end, spans)) for begin, end in spans]

    def outside(self) -> Body:
        """What is executed once."""
        spans = self._loop_spans()
        return Body(self._without(0, len(self.instructions[0]), spans))

    def _loop_spans(self) -> list[tuple[int, int]]:
        found, labels = self.instructions
        ends: dict[int, int] = {}  # a loop may jump back from several places
        for place, instruction in enumerate(found):
            jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)
            begin = labels.get(jump[1], place + 1) if jump else place + 1
            if begin <= place and place + 1 - begin >= SHORTEST_LOOP:
                ends[begin] = place + 1
        return sorted(ends.items(), key=lambda span: (span[0], -span[1]))

    def _without(self, begin: int, end: int, spans: list[tuple[int, int]]) -> list[str]:
        inner = [span for span in spans if begin <= span[0] and span[1] <= end and span != (begin, end)]
        inside = {place for span in inner for place in range(*span)}
        return [self.instructions[0][place] for place in range(begin, end) if place not in inside]


@cache
def _tool(name: str, option: str, binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(TOOLS / name), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT_S).stdout


def _kernel(function: JITFunction, compiled_kernel: Any) -> Kernel:
    names = function.arg_names
    constants = {names[place[0]]: value for place, value in compiled_kernel.src.constants.items()}
    metadata = compiled_kernel.metadata
    binary = compiled_kernel.asm["cubin"]
    return Kernel(function.fn.__name__, constants, binary, metadata.shared, metadata.num_warps)


@contextlib.contextmanager
def compiled(capability: int) -> Iterator[list[Kernel]]:
    """The kernels that are launched inside, compiled and not run. TRITON_INTERPRET must not be set."""
    found: list[Kernel] = []
    run = JITFunction.run

    def only_compile(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append(_kernel(self, run(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(_AbsentGPU(GPUTarget("cuda", capability, 32)))
    JITFunction.run = only_compile
    try:
        yield found
    finally:
        JITFunction.run = run
