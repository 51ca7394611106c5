"""The CUDA path of DualRouting attention: Triton kernels behind the functions of the folder above.

In and out: what `routed_attention`, `select_blocks`, `local_attention` and a step of `decode_global` get and
give. `why_not` says what keeps the kernels from a call; such a call goes to plain torch.

**What is tested.** Values and gradients against `reference`, in Triton's interpreter on a CPU, at tiny sizes;
and that every kernel compiles to machine code for the GPUs that the test names. They have never run on a GPU,
and no speed was ever measured: the sizes of tiles follow from the registers and the shared memory that
the compiler reports.

    selection.py         which blocks a token reads: scores and running top-k in one kernel
    pair_lists.py        (token, block) pairs sorted by block and cut into programs
    routed.py            routed attention as a differentiable operator
    routed_forward.py    its forward kernels
    routed_backward.py   its backward kernels
    far.py               pseudo-keys: which are open to a row, and their gradients
    local.py             the local route as a differentiable operator
    windowed.py          kernels of attention to a window
    gradients.py         the gradient of a softmax, one tile at a time; rows that hold a NaN
    decode.py            one step of the global route from a cache
    tiles.py             loading rows, running softmax, sizes of tiles by device

Nothing here needs a GPU to be imported, only the package `triton`. With
TRITON_INTERPRET=1 the same functions run, slowly, on tensors of the CPU.

Shapes: H query heads, H_kv key heads, d head_dim, S slots of the stream, nb blocks, C = 1 + top_k.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dualroute.attention.backends.triton.decode import decode_step
from dualroute.attention.backends.triton.local import local_attention
from dualroute.attention.backends.triton.routed import routed_attention
from dualroute.attention.backends.triton.selection import select_blocks
from dualroute.attention.backends.triton.tiles import MAX_BLOCK, MAX_DIM
from dualroute.attention.core.precision import HALF

__all__ = ["decode_step", "local_attention", "routed_attention", "select_blocks", "why_not"]

MIN_CAPABILITY = (8, 0)  # Ampere: tensor cores for bfloat16
LARGE_SHARED_MEMORY = 160 << 10  # bytes per SM that A100, H100 and B200 have, and smaller cards have not


def why_not(query: Tensor, *, block: int | None = None) -> str | None:
    """Why the kernels cannot take queries (..., d) of a route with blocks of `block` tokens, or None.

    They want a GPU of compute capability 8.0 or more, or the interpreter; 16 or 32-bit floats; and heads
    whose tiles fit into its shared memory. The local route knows no blocks: leave `block` out for it.
    """
    dim, kind = query.shape[-1], str(query.dtype).removeprefix("torch.")
    if query.dtype not in (*HALF, torch.float32):
        return f"the Triton kernels have floats of 16 and 32 bits only, not {kind}"
    if block is not None and block > MAX_BLOCK:
        return f"block {block} is more than the {MAX_BLOCK} that the Triton kernels take"
    if dim > MAX_DIM:
        return f"head_dim {dim} is more than the {MAX_DIM} that the Triton kernels take"
    if triton.knobs.runtime.interpret:
        return None if query.device.type == "cpu" else "Triton's interpreter is for CPUs"
    if query.device.type != "cuda" or torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA GPUs only"
    gpu = torch.cuda.get_device_properties(query.device)
    if (gpu.major, gpu.minor) < MIN_CAPABILITY:
        return f"compute capability {gpu.major}.{gpu.minor} is less than the 8.0 of the Triton kernels"
    widest = 128 if gpu.shared_memory_per_multiprocessor >= LARGE_SHARED_MEMORY else 64
    if query.dtype == torch.float32 and dim > widest:
        return f"head_dim {dim} in {kind} is more than the {widest} for which there is shared memory"
    return None
