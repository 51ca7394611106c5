"""The C++ kernels as a back end: attention on a CPU; what they have not, plain torch does."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from dualroute.attention.backends import cpp
from dualroute.attention.backends.cpp import build
from dualroute.attention.backends.torch import TorchBackend
from dualroute.attention.core.layout import Stream
from dualroute.attention.core.routing import Routing

VECTORS = {64: "AVX-512", 32: "AVX2"}  # by their bytes


class CppBackend(TorchBackend):
    """See `dualroute.attention.backend.Backend`."""

    tokens: ModuleType | None = cpp
    similar_order = staticmethod(cpp.similar_order)

    def description(self) -> str:
        size = build.load().vector_bytes()
        unit = ", AMX for bfloat16" if cpp.unit_in_use() == "AMX" else ""
        return f"C++ kernels, {VECTORS.get(size, f'vectors of {8 * size} bits')}{unit}"

    def supports(self, query: Tensor, *, causal: bool = True, block: int | None = None) -> bool:
        return cpp.available(query)

    def select_blocks(
        self, query: Tensor, key: Tensor, stream: Stream, *, causal: bool = True, **options: Any
    ) -> Tensor:
        return cpp.select_blocks(query, key, stream, causal=causal, **options)

    def routed_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        stream: Stream,
        routing: Routing,
        *,
        selected: Tensor,
        causal: bool = True,
    ) -> Tensor:
        return cpp.routed_attention(query, key, value, stream, routing, selected=selected, causal=causal)

    def local_attention(
        self, query: Tensor, key: Tensor, value: Tensor, stream: Stream, *, window: int, causal: bool = True
    ) -> Tensor:
        return cpp.local_attention(query, key, value, stream, window=window, causal=causal)

    def full_attention(
        self, query: Tensor, key: Tensor, value: Tensor, stream: Stream, *, causal: bool = True
    ) -> Tensor:
        """With a window that hides nothing, where that is faster than torch's own attention."""
        if not cpp.faster_in_full(query):
            return super().full_attention(query, key, value, stream, causal=causal)
        longest = max(bucket.blocks for bucket in stream.buckets) * stream.block
        return cpp.local_attention(query, key, value, stream, window=longest, causal=causal)


CPP = CppBackend()
