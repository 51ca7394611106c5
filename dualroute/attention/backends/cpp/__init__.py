"""The CPU path of DualRouting attention: C++ kernels behind the functions of the folder above.

In and out: what `routed_attention`, `select_blocks` and `local_attention` get and give; a step of
decoding of both routes, and the product with an int8 weight that is most of such a step. `available` and
`can_decode` say whether the kernels can take a call; whoever gets a no uses the plain path.

    build.py        compiles sources/ for this machine, once, into the user's cache
    operators.py    the C++ functions on tensors
    routes.py       routed and local attention as differentiable functions
    decode.py       one token of a text as an operator that torch.compile can call
    int8_product.py the int8 weights that surround it, likewise
    c_functions.py  what torch.compile calls these two by
    sources/
      vectors.h       vectors, their exponential, the small matrix product
      matrix_unit.h   products of bfloat16 by the processor's matrix unit
      tiles.h         a tile of queries and a tile of keys: one step of the softmax, and its gradient
      packed_backward.h  that gradient for products of bfloat16
      select.h        which blocks a token reads: scores and running top-k; similar keys side by side
      routed.h        routed attention; routed_forward.h, routed_backward.h its two directions
      local.h         the local route, both directions
      stored.h        rows as they are stored: floats, bfloat16, and int8 in a cache
      decode.h        one token, both routes
      int8_product.h  one token's row times an int8 weight
      torch_ops.h     these two as operators of torch, and as functions that compiled programs call
      kernels.cpp     what Python calls

Functions get plain pointers, and what is included of torch is its stable interface
alone, which torch has from 2.10 on: compiling takes seconds.

Shapes: H query heads, H_kv key heads, d head_dim, S slots of the stream, nb blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualroute.attention.backends.cpp.c_functions import C_FUNCTIONS
from dualroute.attention.backends.cpp.decode import cache_memory, can_decode, decode_layer
from dualroute.attention.backends.cpp.int8_product import fast_int8_product, int8_panels, int8_product
from dualroute.attention.backends.cpp.operators import similar_order, unit_in_use, use_unit
from dualroute.attention.backends.cpp.routes import local_attention, routed_attention, select_blocks

__all__ = [
    "C_FUNCTIONS",
    "available",
    "cache_memory",
    "can_decode",
    "decode_layer",
    "fast_int8_product",
    "faster_in_full",
    "int8_panels",
    "int8_product",
    "local_attention",
    "routed_attention",
    "select_blocks",
    "similar_order",
    "unit_in_use",
    "use_unit",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def faster_in_full(query: Tensor) -> bool:
    """Whether `local_attention` with a window that hides nothing is faster than torch's own attention.

    In bfloat16 where both use the processor's matrix unit; where these kernels widen it, and in float16, not.
    """
    if query.dtype == torch.bfloat16:
        return unit_in_use() == "AMX"
    return query.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")


def available(query: Tensor) -> bool:
    """Whether the kernels can take queries (..., d): floats in a CPU's memory, nothing that traces."""
    real = type(query) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    return real and query.device.type == "cpu" and query.dtype in DTYPES
