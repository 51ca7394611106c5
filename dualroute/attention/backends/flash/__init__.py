"""The routes of a CUDA device without kernels of our own: flash attention's operators, which torch brings.

    operators.py   the two operators, over many sequences in one launch
    documents.py   full attention and the local route: one launch each
    routed.py      own block + chosen blocks + far blocks in one softmax, forward and backward
    select.py      which blocks a token reads
    pairs.py       the chosen blocks: (token, block) pairs sorted by block
    far.py         the joint softmax with the pseudo-keys of far blocks
    slabs.py       what is worked on at once where every token meets every block
    backend.py     the `Backend`

**What is tested.** Values and gradients against `reference` on a CPU, with a stand-in for the operators that
has their schema; the number of launches, and that nothing is read back from the device. They have never run
on a GPU.

What the operators cannot do runs in plain torch: `why_not` names the reason.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dualroute.attention.backends.flash.documents import attend_documents
from dualroute.attention.backends.flash.routed import routed_attention
from dualroute.attention.backends.flash.select import select_blocks
from dualroute.attention.core.precision import HALF

__all__ = ["attend_documents", "routed_attention", "select_blocks", "why_not"]

MAX_DIM = 256
MIN_CAPABILITY = (8, 0)  # Ampere


def why_not(query: Tensor) -> str | None:
    """The reason why queries (..., d) cannot be taken by any of the routes; None if they can."""
    if query.device.type != "cuda":
        return f"flash attention's operators are for CUDA devices, not for {query.device.type}"
    if query.dtype not in HALF:
        return f"flash attention has bfloat16 and float16 only, not {str(query.dtype).removeprefix('torch.')}"
    dim = query.shape[-1]
    if dim > MAX_DIM or dim % 8:
        return f"flash attention takes a head_dim of at most {MAX_DIM}, a multiple of 8, not {dim}"
    return _why_not_here(query.device)


@functools.cache
def _why_not_here(device: torch.device) -> str | None:
    """What the installed torch, or the device, lacks."""
    if torch.version.hip is not None:
        return "flash attention's operators were read for CUDA, not for ROCm"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without flash attention"
    if not hasattr(torch.ops.aten, "_flash_attention_forward"):
        return f"torch {torch.__version__} has no aten::_flash_attention_forward"
    if (found := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        return (
            f"flash attention needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}, not {found}"
        )
    return None
