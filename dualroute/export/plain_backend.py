"""Which kernels run: plain torch, everywhere.

Stands in for :mod:`dualroute.attention.backend` in an exported folder.  The Triton kernels stay behind: they
need a package that who loads the folder may not have, and are not needed for the same numbers.
"""

from __future__ import annotations

from torch import Tensor


def triton_kernels(query: Tensor, *, block: int = 1, causal: bool = True) -> None:
    """No kernels but torch's own."""
    return None
