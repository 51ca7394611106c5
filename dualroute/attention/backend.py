"""Which kernels run: plain torch everywhere, or the Triton ones where they can.

In: the queries of a route, and DUALROUTE_KERNELS from the environment. Out: the package `triton_kernels`, or
None for the plain path.

The surprising fact: plain torch is the default on a GPU too. The Triton kernels are tested in the interpreter
and compiled for GPUs, but have not been timed on one; whoever has one turns them on and compares.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from torch import Tensor

VARIABLE = "DUALROUTE_KERNELS"
CHOICES = ("torch", "triton")


def triton_kernels(query: Tensor, *, block: int = 1, causal: bool = True) -> ModuleType | None:
    """The Triton kernels if they were asked for and can take these queries (..., d); else None.

    Raises:
        ValueError: DUALROUTE_KERNELS is no known name, or names Triton, which is not installed.
    """
    wanted = os.environ.get(VARIABLE, "torch")
    if wanted == "torch":
        return None
    if wanted not in CHOICES:
        raise ValueError(f"{VARIABLE}={wanted} is unknown: set it to {' or '.join(CHOICES)}")
    try:
        kernels = importlib.import_module("dualroute.attention.triton_kernels")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ValueError(f"{VARIABLE}=triton, but Triton is not installed: pip install triton") from error
    return kernels if kernels.available(query, block=block, causal=causal) else None
