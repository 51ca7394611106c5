"""What the Triton kernels might take on an H100, from their machine code. An estimate, never a measurement.

    python benchmarks/gpu_estimate.py [--rows 64k] [--output DIR]

Every kernel is compiled for compute capability 9.0 on whatever machine this is. Each of its loops is then a
number of instructions and of matrix products, and the shape of the task says how often it is passed. A kernel
takes the longest of three: issuing its instructions, multiplying its matrices, moving its bytes. What torch
does in between (sorting the lists of pairs, features and summaries of blocks) is counted by bytes.

The two ends of each range differ in how well warps hide each other's waiting. The table names the dense
attention of the same heads by the rates that its authors published: FlashAttention-2 on an H100 (arXiv
2307.08691, 2407.08608). `--rows` also prints the kernels of the shapes whose name contains the given words.

Only the order of magnitude is to be believed, and which kernel to mend first.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from machine_code import Body, Kernel, compiled
from measure import show

from dualroute.attention import Layout, Routing
from dualroute.attention.backends.triton import local_attention, routed_attention

SMS, CLOCK = 132, 1.755e9  # H100 SXM
SCHEDULERS = 4  # per SM, one instruction of a warp and clock each
REGISTERS, SHARED_MEMORY = 65536, 227 << 10  # per SM
PRODUCTS = 2048  # multiply-adds of half-precision numbers per SM and clock
OLD_PRODUCTS = 0.62  # the share of these that mma.sync reaches, which wgmma replaces
TENSOR_USE = (0.5, 0.8)  # of the products that can be had
# Instructions per scheduler and clock, by the number of warps that a scheduler can choose from
ISSUE = {1: (0.15, 0.25), 2: (0.25, 0.4), 3: (0.35, 0.5), 4: (0.35, 0.55)}
HBM, L2 = (1.7e12, 2.6e12), (3.5e12, 5.5e12)  # bytes per second
LAUNCH = (2e-6, 5e-6)  # seconds that the GPU waits between two kernels
SORT = (0.16e-6, 0.1e-6)  # seconds per 1000 pairs, beside the launches
FLASH_2 = {64: (324e12, 290e12), 128: (370e12, 322e12)}  # FLOP/s forward, backward
Range = tuple[float, float]  # slow, fast


class Shape(NamedTuple):
    """Heads are those of each route; dense attention is given twice as many."""

    name: str
    tokens: int
    heads: int
    dim: int
    window: int
    block: int
    top_k: int

    @property
    def blocks(self) -> int:
        return self.tokens // self.block

    @property
    def pairs(self) -> int:
        return self.tokens * self.heads * min(self.top_k + 1, self.blocks // 2)


SHAPES = (
    Shape("8k, 128/64/4", 8192, 4, 64, 128, 64, 4),
    Shape("32k, 128/64/4", 32768, 4, 64, 128, 64, 4),
    Shape("64k, 128/64/4", 65536, 4, 64, 128, 64, 4),
    Shape("128k, 128/64/4", 131072, 4, 64, 128, 64, 4),
    Shape("64k, 512/64/16", 65536, 4, 64, 512, 64, 16),
    Shape("4k, 1b: 512/64/16", 4096, 8, 128, 512, 64, 16),
    Shape("16k, 1b: 512/64/16", 16384, 8, 128, 512, 64, 16),
)


class Row(NamedTuple):
    """Milliseconds of a kernel or of what torch does."""

    name: str
    backward: bool
    time: Range
    bound: str


@cache
def kernels(dim: int, window: int, block: int, top_k: int) -> tuple[Kernel, ...]:
    """Forward and backward of both routes."""
    length = 8 * block
    stream = Layout.build(1, length, block).stream
    rows = [torch.zeros(1, length, dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    with compiled(90) as found:
        out = routed_attention(*rows, stream, Routing(top_k, sub_block=min(16, block)))
        out = out + local_attention(*rows, stream, window=window)
        out.backward(torch.zeros_like(out))
    return tuple(found)


@cache
def turns(blocks: int, top_k: int, columns: int, rows: int) -> float:
    """How often some row of a tile of scores takes a block into its best ones, for scores without order."""
    random = np.random.default_rng(0)
    lengths = [max(columns, blocks * part // 4) for part in (1, 2, 3, 4)]
    found = [_turns(random.standard_normal((rows, length)), top_k, columns) for length in lengths]
    return float(np.average(found, weights=lengths))


def _turns(scores: np.ndarray, top_k: int, columns: int) -> float:
    best, total, tiles = np.full((len(scores), top_k), -np.inf), 0, 0
    for begin in range(0, scores.shape[1], columns):
        both = np.concatenate([best, scores[:, begin : begin + columns]], 1)
        taken = np.argsort(-both, 1)[:, :top_k]
        total += int((taken >= top_k).sum(1).max())  # what a row takes stays, for it takes the best first
        best, tiles = np.take_along_axis(both, taken, 1), tiles + 1
    return total / tiles


def _issue(kernel: Kernel) -> Range:
    warps = kernel.warps
    by_registers = REGISTERS // (max(kernel.resources["REG"], 32) * 32 * warps)
    by_memory = SHARED_MEMORY // (kernel.shared + 1024)
    return ISSUE[min(max(1, min(by_registers, by_memory) * warps // SCHEDULERS), max(ISSUE))]


def _products(body: Body, warps: int) -> float:
    """Clocks of an SM that the matrix products of one passage of `warps` warps take."""
    clocks = 0.0
    for text in body.instructions:
        if "HGMMA" in text:
            rows, columns, depth = map(int, re.findall(r"(\d+)x(\d+)x(\d+)", text)[0])
            clocks += rows * columns * depth * (warps / 4) / PRODUCTS
        elif "HMMA.16816" in text:
            clocks += 16 * 8 * 16 * warps / PRODUCTS / OLD_PRODUCTS
        elif "HMMA.1688" in text:
            clocks += 16 * 8 * 8 * warps / PRODUCTS / OLD_PRODUCTS
    return clocks


def estimate(
    kernel: Kernel, backward: bool, programs: float, passes: list[float], read: Range = (0, 0)
) -> Row:
    """A kernel of `programs` thread blocks that pass their loops so often; `read` is bytes of HBM and of L2.

    The last loop may be missing: a short one the compiler writes out.

    Raises:
        ValueError: the machine code has another number of loops.
    """
    loops = kernel.loops()
    if len(loops) == len(passes) - 1 and len(loops):
        passes = passes[:-1]
    if len(loops) != len(passes):
        sizes = [loop.size for loop in loops]
        raise ValueError(f"{kernel.name} has {len(loops)} loops of {sizes}, expected were {len(passes)}")
    parts = [(kernel.outside(), 1.0), *zip(loops, passes, strict=True)]
    instructions = programs * kernel.warps * sum(body.size * times for body, times in parts)
    clocks = programs * sum(_products(body, kernel.warps) * times for body, times in parts)
    spread = SMS * CLOCK * min(1.0, programs / SMS)
    times = []
    for end, use in enumerate(TENSOR_USE):
        sides = {
            "issue": instructions / (spread * SCHEDULERS * _issue(kernel)[end]),
            "products": clocks / (spread * use),
            "memory": max(read[0] / HBM[end], read[1] / L2[end]),
        }
        times.append(max(sides.values()) + LAUNCH[1 - end])
    name = f"{kernel.name.removesuffix('_kernel')} {'backward' if backward else 'forward'}"
    return Row(name, backward, (times[0] * 1e3, times[1] * 1e3), max(sides, key=lambda side: sides[side]))


def _torch(name: str, backward: bool, data: float, launches: int, pairs: float = 0) -> Row:
    times = [data / HBM[end] + launches * LAUNCH[1 - end] + pairs / 1000 * SORT[end] for end in (0, 1)]
    return Row(name, backward, (times[0] * 1e3, times[1] * 1e3), "torch")


def _forward_and_backward(shape: Shape) -> list[Row]:
    """Every kernel and step of both routes, forward first."""
    rows, backward = [], False
    for kernel in kernels(shape.dim, shape.window, shape.block, shape.top_k):
        backward = backward or kernel.name == "delta_kernel"  # the first of every backward pass
        rows.append(estimate(kernel, backward, *PASSES[kernel.name](kernel, shape, backward)))
    pairs, row = shape.pairs, shape.tokens * shape.heads * shape.dim * 2
    rows += [
        _torch("sort of pairs forward", False, pairs * 4 * 2, 12, pairs),
        _torch("features and summaries", False, row * 10, 14),
        _torch("sort of pairs backward", True, pairs * 4 * 2, 12, pairs),
        _torch("summaries, zeros, casts", True, row * 20, 20),
    ]
    return sorted(rows, key=lambda part: part.backward)


def _select(kernel: Kernel, shape: Shape, backward: bool) -> tuple[float, list[float], Range]:
    """As if every tile of blocks were scored: how many are passed over by their bounds is up to the text."""
    tile = kernel.constants
    tiles = shape.blocks / 2 / tile["COLUMNS"]
    programs = shape.tokens / tile["ROWS"] * shape.heads
    taken = turns(shape.blocks, shape.top_k, tile["COLUMNS"], tile["ROWS"])
    feature = tile["PARTS"] * shape.dim * 2 * 2
    return programs, [tiles / tile["STEP"], tiles, tiles * taken], (0, programs * shape.blocks / 2 * feature)


def _pairs(kernel: Kernel, shape: Shape, backward: bool) -> tuple[float, list[float], Range]:
    tile = kernel.constants
    programs = shape.pairs / tile["CHUNK"] + shape.heads * shape.blocks / 2
    passes = shape.pairs / tile["ROWS"] * 1.15 / programs  # the last tile of a program is not full
    rows = shape.pairs * shape.dim * 2
    partial = programs * shape.block * shape.dim * 8 if backward else 0
    return programs, [passes], (rows + partial, rows * (3 if backward else 2))


def _tokens(kernel: Kernel, shape: Shape, backward: bool) -> tuple[float, list[float], Range]:
    tile = kernel.constants
    programs = shape.tokens / tile["ROWS"] * shape.heads
    own = (max(shape.block, tile["ROWS"]) + tile["ROWS"]) / 2 / tile["KEYS"]
    far = shape.blocks / 2 / tile["KEYS"]
    rows = shape.pairs * shape.dim * 2
    far_bytes = programs * shape.blocks / 2 * shape.dim * 2 * 3
    again = [far] if tile.get("TWICE") else []
    return programs, [*again, max(1.0, own), far, min(shape.top_k + 1, shape.blocks / 2)], (rows, far_bytes)


def _bits(kernel: Kernel, shape: Shape, backward: bool) -> tuple[float, list[float], Range]:
    programs = shape.tokens / kernel.constants["ROWS"] * shape.heads
    return programs, [shape.blocks / 64], (shape.tokens * shape.heads * shape.blocks / 16, 0)


def _far(kernel: Kernel, shape: Shape, backward: bool) -> tuple[float, list[float], Range]:
    tile = kernel.constants
    tiles = math.ceil(shape.blocks / tile["KEYS"]) * shape.heads
    splits = max(1, min(32, 512 // tiles, shape.blocks // 8))
    passes = shape.tokens / 2 / tile["ROWS"]  # of all splits of a tile together
    read = tiles * shape.tokens / 2 * shape.dim * 2 * 2
    return tiles * splits, [passes / splits], (tiles * splits * tile["KEYS"] * shape.dim * 4 * 3, read)


def _windowed(walk: str, hold: str) -> Passes:
    def count(kernel: Kernel, shape: Shape, backward: bool) -> tuple[float, list[float], Range]:
        tile = kernel.constants
        own = tile.get("ADD", False)  # gradients of own blocks
        window = 1 if own and tile[hold] >= shape.block else shape.block if own else shape.window
        programs = shape.tokens / tile[hold] * shape.heads
        return programs, [math.ceil((window - 1 + tile[hold]) / tile[walk])], (0, 0)

    return count


def _bytes(rows: float) -> Passes:
    def count(kernel: Kernel, shape: Shape, backward: bool) -> tuple[float, list[float], Range]:
        moved = rows * shape.tokens * shape.heads * shape.dim
        return moved / 8192, [0.0 for _ in kernel.loops()], (moved, 0)

    return count


Passes = Callable[[Kernel, Shape, bool], tuple[float, list[float], Range]]
PASSES: dict[str, Passes] = {
    "select_kernel": _select,
    "pairs_kernel": _pairs,
    "tokens_kernel": _tokens,
    "far_kernel": _far,
    "forward_kernel": _windowed("KEYS", "ROWS"),
    "query_gradient_kernel": _windowed("KEYS", "ROWS"),
    "key_gradient_kernel": _windowed("ROWS", "KEYS"),
    "blocks_kernel": _bytes(24),
    "delta_kernel": _bytes(4),
    "poison_kernel": _bytes(2),
    "bits_kernel": _bits,
}


def dense(shape: Shape) -> tuple[float, float]:
    """Milliseconds of FlashAttention-2 with the heads of both routes: forward, forward and backward."""
    forward, backward = FLASH_2[64 if shape.dim <= 64 else 128]
    work = 2 * shape.tokens**2 * shape.dim * 2 * shape.heads  # causal: half of four products
    return work / forward * 1e3, (work / forward + 2.5 * work / backward) * 1e3


def summary(shape: Shape) -> dict[str, str]:
    """A line of the table."""
    rows = _forward_and_backward(shape)
    forward = [sum(row.time[end] for row in rows if not row.backward) for end in (0, 1)]
    both = [sum(row.time[end] for row in rows) for end in (0, 1)]
    dense_forward, dense_both = dense(shape)
    return {
        "tokens, window/block/top_k": shape.name,
        "forward ms": f"{forward[1]:.2f}-{forward[0]:.2f}",
        "with backward ms": f"{both[1]:.2f}-{both[0]:.2f}",
        "FlashAttention-2 ms": f"{dense_forward:.2f} / {dense_both:.2f}",
        "x forward": f"{dense_forward / forward[0]:.1f}-{dense_forward / forward[1]:.1f}",
        "x with backward": f"{dense_both / both[0]:.1f}-{dense_both / both[1]:.1f}",
    }


def detail(shape: Shape) -> list[dict[str, str]]:
    """A line per kernel."""
    return [
        {"kernel": row.name, "ms": f"{row.time[1]:.3f}-{row.time[0]:.3f}", "bound by": row.bound}
        for row in _forward_and_backward(shape)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="*", default=[""], help="only those whose name contains one of these"
    )
    parser.add_argument("--rows", nargs="*", default=[], help="print the kernels of those, too")
    parser.add_argument("--output", type=Path, help="folder for gpu_estimate.csv")
    options = parser.parse_args()
    shapes = [shape for shape in SHAPES if any(words in shape.name for words in options.shapes)]
    title = "Estimated from machine code for an H100, not measured"
    show(title, [summary(shape) for shape in shapes], options.output, "gpu_estimate")
    for shape in shapes:
        if any(words in shape.name for words in options.rows):
            show(f"{shape.name} (estimated)", detail(shape), None, "")


if __name__ == "__main__":
    main()
