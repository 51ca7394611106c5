"""Which kernels run: plain torch, everywhere.

Stands in for :mod:`dualroute.attention.backend` in an exported folder.  The other kernels stay behind: they
need a compiler or a package that who loads the folder may not have, and are not needed for the same numbers.
"""

from __future__ import annotations

from torch import Tensor


def fast_kernels(query: Tensor, *, causal: bool = True, block: int | None = None) -> None:
    """No kernels but torch's own."""
    return None
