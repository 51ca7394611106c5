"""What all kernels share: loading rows, one step of a running softmax, sizes of tiles, places of documents.

In: pointers to contiguous rows of `DIM` numbers. Out: tiles padded to `DIM_PAD`, a power of two, with zeros.

Every kernel here works on plain ranges of slots, wherever documents and blocks begin.
What a row may see is a comparison of slot numbers inside the tile, so no tile has to be aligned to a block,
and a block of 24 tokens needs no code of its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualroute.attention.core.layout import Stream
from dualroute.attention.core.precision import HALF

MAX_BLOCK, MAX_DIM = 256, 256  # the largest that the tests compile and compare
LOG2_E = 1.4426950408889634
LOG_2_E, LN_2 = tl.constexpr(LOG2_E), tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(base, rows, row_mask, DIM: tl.constexpr, DIM_PAD: tl.constexpr, STRIDE: tl.constexpr):
    """(rows, DIM_PAD) tile of the first DIM numbers of rows that are STRIDE apart; 0 where masked."""
    columns = tl.arange(0, DIM_PAD)
    return tl.load(
        base + rows[:, None] * STRIDE + columns[None, :],
        mask=row_mask[:, None] & (columns < DIM)[None, :],
        other=0.0,
    )


@triton.jit
def load_part(
    base, rows, row_mask, begin, DIM: tl.constexpr, PART: tl.constexpr, STRIDE: tl.constexpr
):  # fmt: skip
    """(rows, PART) tile of the numbers begin..begin + PART - 1 of rows of DIM numbers; 0 behind the last."""
    columns = begin + tl.arange(0, PART)
    return tl.load(
        base + rows[:, None] * STRIDE + columns[None, :],
        mask=row_mask[:, None] & (columns < DIM)[None, :],
        other=0.0,
    )


@triton.jit
def store_rows(base, rows, row_mask, tile, DIM: tl.constexpr, DIM_PAD: tl.constexpr, STRIDE: tl.constexpr):
    """The inverse of `load_rows`, in the type of the target."""
    columns = tl.arange(0, DIM_PAD)
    tl.store(
        base + rows[:, None] * STRIDE + columns[None, :],
        tile.to(base.dtype.element_ty),
        mask=row_mask[:, None] & (columns < DIM)[None, :],
    )


@triton.jit
def dot(a, b):
    """a @ b summed in float32. Float32 factors are split into parts of tf32 that lose next to nothing."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def dot_add(a, b, total):
    """total + a @ b."""
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def softmax_step(total, peak, norm, logits, values):
    """Add keys with (rows, keys) logits, -inf = closed, and (keys, d) values to a running softmax.

    Logits are in units of log 2, so that exp2 needs no factor: multiply them by LOG2_E. `total` (rows, d) is
    the sum of exp2(logit - peak) * value so far, `norm` (rows,) that of exp2(logit - peak)
    (Milakov and Gimelshein, arXiv 1805.02867; flash attention, arXiv 2205.14135).
    """
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # nothing open yet: exp2(-inf - 0) = 0
    weights = tl.exp2(logits - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay[:, None] + dot(weights.to(values.dtype), values)
    return total, new_peak, norm * decay + tl.sum(weights, 1)


class Tile(NamedTuple):
    """Sizes of a launch: query rows, key columns at most (0 where the work says how many), warps."""

    rows: int
    columns: int
    warps: int


# By the major number of the compute capability and the work of a kernel: tiles of half-precision heads of up
# to 64, 128 and 256 numbers. They are the largest that do not spill (tests/attention/backends/triton/
# test_compile.py; docs/gpu.md tells what was seen of 256), and for 9, up to 128, 64 rows at least of what is
# held, which wgmma wants. No tile was timed.
# What pairs_key holds grows with its keys, too, see `pairs_key_tile`.
TILES: dict[int, dict[str, tuple[Tile, Tile, Tile]]] = {
    8: {
        "select": (Tile(128, 0, 4), Tile(32, 0, 4), Tile(32, 0, 8)),
        "window": (Tile(64, 64, 4), Tile(64, 64, 4), Tile(64, 32, 8)),
        "window_query": (Tile(64, 64, 4), Tile(64, 32, 4), Tile(32, 32, 8)),
        "window_key": (Tile(32, 64, 4), Tile(32, 64, 4), Tile(32, 32, 8)),
        "tokens": (Tile(64, 64, 4), Tile(64, 32, 4), Tile(32, 32, 8)),
        "tokens_query": (Tile(64, 32, 4), Tile(32, 32, 4), Tile(32, 16, 8)),
        "pairs": (Tile(64, 128, 4), Tile(64, 128, 4), Tile(64, 32, 8)),
        "pairs_key": (Tile(32, 128, 4), Tile(32, 64, 8), Tile(32, 32, 8)),
        "far": (Tile(32, 32, 4), Tile(16, 32, 4), Tile(16, 32, 8)),
    },
    9: {
        "select": (Tile(128, 0, 4), Tile(128, 0, 8), Tile(128, 0, 8)),
        "window": (Tile(64, 64, 4), Tile(64, 64, 4), Tile(64, 64, 8)),
        "window_query": (Tile(64, 64, 4), Tile(64, 32, 4), Tile(64, 32, 8)),
        "window_key": (Tile(64, 64, 4), Tile(32, 64, 4), Tile(32, 64, 8)),
        "tokens": (Tile(64, 64, 4), Tile(64, 64, 4), Tile(32, 32, 8)),
        "tokens_query": (Tile(64, 64, 4), Tile(64, 32, 4), Tile(32, 32, 8)),
        "pairs": (Tile(64, 128, 4), Tile(64, 128, 4), Tile(64, 64, 8)),
        "pairs_key": (Tile(64, 128, 4), Tile(128, 128, 8), Tile(32, 32, 8)),
        "far": (Tile(32, 64, 4), Tile(16, 64, 4), Tile(16, 32, 8)),
    },
    10: {
        "select": (Tile(128, 0, 4), Tile(64, 0, 4), Tile(64, 0, 8)),
        "window": (Tile(64, 64, 4), Tile(64, 64, 4), Tile(64, 32, 8)),
        "window_query": (Tile(64, 64, 4), Tile(64, 32, 4), Tile(64, 32, 8)),
        "window_key": (Tile(64, 64, 4), Tile(32, 64, 4), Tile(32, 32, 8)),
        "tokens": (Tile(64, 64, 4), Tile(64, 32, 4), Tile(32, 32, 8)),
        "tokens_query": (Tile(64, 64, 4), Tile(32, 32, 4), Tile(32, 32, 8)),
        "pairs": (Tile(64, 128, 4), Tile(64, 128, 4), Tile(64, 32, 8)),
        "pairs_key": (Tile(64, 128, 4), Tile(128, 128, 8), Tile(32, 32, 8)),
        "far": (Tile(32, 64, 4), Tile(16, 64, 4), Tile(16, 16, 8)),
    },
}  # fmt: skip


def tile_for(work: str, dim: int, dtype: torch.dtype) -> Tile:
    """The tile of a kind of work on the GPU that is launched on; small ones for float32."""
    if dtype not in HALF:
        return Tile(32, 32, 4) if dim <= 128 else Tile(16, 16, 4)
    return TILES.get(_major(), TILES[8])[work][(dim > 64) + (dim > 128)]


def pairs_key_tile(dim: int, block: int, dtype: torch.dtype) -> Tile:
    """Of the backward kernel of pairs: keys, values and the sums of their gradients fill the registers.

    Where a block has more keys than `columns`, it is worked on in parts.
    """
    tile = tile_for("pairs_key", dim, dtype)
    keys = min(pad_dim(block), tile.columns)
    if dtype in HALF and keys > 64 and dim <= 64:
        tile = tile_for("pairs_key", 128, dtype)
    elif keys > 64 and dim <= 128:
        tile = tile._replace(rows=min(tile.rows, 32))
    return tile._replace(columns=keys)


def _major() -> int:
    """Of the compute capability; the interpreter takes the tiles of an H100."""
    if triton.knobs.runtime.interpret:
        return 9
    return triton.runtime.driver.active.get_current_target().arch // 10


def pad_dim(dim: int) -> int:
    """Width of the tile for rows of `dim` numbers: tl.dot wants at least 16, tl.arange a power of 2."""
    return max(16, triton.next_power_of_2(dim))


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch on the device of `tensor`: Triton takes the current one, which may be another."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def block_places(stream: Stream) -> Tensor:
    """(3, nb) int32: the first and the last + 1 block of the document of each block, and its own tokens,
    which lie at its beginning."""
    return stream.cached("triton_block_places", lambda: _block_places(stream))


def _block_places(stream: Stream) -> Tensor:
    first = stream.first_blocks()
    end = first + stream.blocks_in_document().to(torch.int32)
    return torch.stack([first, end, stream.tokens_in_block().to(torch.int32)])


def document_slots(stream: Stream, *, tokens_only: bool) -> tuple[Tensor, Tensor]:
    """(S,) int32 each: first and last + 1 slot of the document of each slot.

    The end counts the slots that fill up the last block, unless `tokens_only`.
    """
    return stream.cached(("triton_document_slots", tokens_only), lambda: _document_slots(stream, tokens_only))


def _document_slots(stream: Stream, tokens_only: bool) -> tuple[Tensor, Tensor]:
    first, size = stream.first_blocks().long(), stream.blocks_in_document()  # (nb,)
    end = (first + size) * stream.block
    if tokens_only:
        end = end - stream.block + stream.tokens_in_block()[first + size - 1]
    begin, end = (
        part.to(torch.int32).repeat_interleave(stream.block, output_size=stream.num_slots)
        for part in (first * stream.block, end)
    )
    return begin, end
