"""The Triton kernels as a back end: GPUs from Ampere on; what they have not, plain torch does."""

from __future__ import annotations

from torch import Tensor

from dualroute.attention.backends import triton
from dualroute.attention.backends.torch import TorchBackend


class TritonBackend(TorchBackend):
    """See `dualroute.attention.backend.Backend`."""

    takes_copies = False

    def description(self) -> str:
        return "Triton kernels"

    def supports(self, query: Tensor, *, causal: bool = True, block: int | None = None) -> bool:
        return self.why_not(query, causal=causal, block=block) is None

    def why_not(self, query: Tensor, *, causal: bool = True, block: int | None = None) -> str | None:
        return triton.why_not(query, block=block)

    select_blocks = staticmethod(triton.select_blocks)
    routed_attention = staticmethod(triton.routed_attention)
    local_attention = staticmethod(triton.local_attention)
    decode_step = staticmethod(triton.decode_step)


TRITON = TritonBackend()
