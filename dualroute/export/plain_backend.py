"""Which back end runs: plain torch, everywhere.

Stands in for :mod:`dualroute.attention.backend` in an exported folder.  The other ones stay behind: they
need a compiler or a package that who loads the folder may not have, and are not needed for the same numbers.
"""

from __future__ import annotations

from torch import Tensor

from dualroute.attention.backends.torch import TorchBackend

Backend = TorchBackend  # the only one there is
_TORCH = TorchBackend()


def plain() -> TorchBackend:
    """Plain torch."""
    return _TORCH


def choose(
    query: Tensor, *, causal: bool = True, block: int | None = None, copies: bool = False
) -> TorchBackend:
    """Plain torch."""
    return _TORCH


def token_kernels(rows: Tensor) -> None:
    """No kernels for single tokens."""
    return None
