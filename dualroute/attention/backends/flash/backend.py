"""Flash attention's operators as a back end, on CUDA; what it has not, plain torch does, for a reason."""

from __future__ import annotations

from torch import Tensor

from dualroute.attention.backends import flash
from dualroute.attention.backends.torch import TorchBackend
from dualroute.attention.core.layout import Stream


class FlashBackend(TorchBackend):
    """See `dualroute.attention.backend.Backend`."""

    takes_copies = False

    def description(self) -> str:
        return "flash attention's operators"

    def supports(self, query: Tensor, *, causal: bool = True, block: int | None = None) -> bool:
        return self.why_not(query, causal=causal, block=block) is None

    def why_not(self, query: Tensor, *, causal: bool = True, block: int | None = None) -> str | None:
        """The reason why `supports` says no; None where it says yes."""
        return flash.why_not(query, causal=causal, block=block)

    select_blocks = staticmethod(flash.select_blocks)
    routed_attention = staticmethod(flash.routed_attention)

    def local_attention(
        self, query: Tensor, key: Tensor, value: Tensor, stream: Stream, *, window: int, causal: bool = True
    ) -> Tensor:
        return flash.attend_documents(query, key, value, stream, window=window, causal=causal)

    def full_attention(
        self, query: Tensor, key: Tensor, value: Tensor, stream: Stream, *, causal: bool = True
    ) -> Tensor:
        return flash.attend_documents(query, key, value, stream, window=None, causal=causal)


FLASH = FlashBackend()
