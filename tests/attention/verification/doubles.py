"""Back ends that are wrong in one way each, or slow, made of plain torch."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from dualroute.attention.backends.torch import TorchBackend
from dualroute.attention.core.precision import accumulation_dtype
from dualroute.attention.verification.correctness import TOLERANCE


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return (grads[0].to(accumulation_dtype(grads[0].dtype)) * 1.03).to(grads[0].dtype)


def no_triton() -> Any:
    """For `backend._triton`: in a process with Triton's interpreter its kernels would run on a CPU."""
    raise ValueError("Triton is not installed")


class Double(TorchBackend):
    """Plain torch whose `fault` shows in the local or the routed route.

    values (1e-2 too large), one_row (of the last head), gradients (3e-2), nan, raises, slow, lazy (a lesser
    block), twice (a block twice), ahead (a block of the future), refuses (all), step (a step of decoding).
    """

    def __init__(self, fault: str = "", route: str = "local") -> None:
        self.fault, self.route = fault, route

    def description(self) -> str:
        return "doubles"

    def supports(self, query: Tensor, *, causal: bool = True, block: int | None = None) -> bool:
        return self.fault != "refuses"

    def _spoilt(self, out: Tensor, key: Tensor) -> Tensor:
        if self.fault == "values":
            return (out.to(accumulation_dtype(out.dtype)) * 1.01).to(out.dtype)
        if self.fault == "one_row":
            out = out.clone()
            out[-1, 3] *= 1 + 15 * TOLERANCE[out.dtype]  # too little to show in the whole
        if self.fault == "nan":
            out = out.clone()
            out[0, 0, 0] = torch.nan
        if self.fault == "raises":
            raise RuntimeError("an illegal instruction\nand a long story")
        if self.fault == "slow":
            time.sleep(0.05)
        return out

    def local_attention(
        self, query: Tensor, key: Tensor, value: Tensor, *given: Any, **options: Any
    ) -> Tensor:
        if self.route == "local" and self.fault == "gradients":
            key = _ScaledGradient.apply(key)
        out = TorchBackend.local_attention(query, key, value, *given, **options)
        return self._spoilt(out, key) if self.route == "local" else out

    def routed_attention(
        self, query: Tensor, key: Tensor, value: Tensor, *given: Any, **options: Any
    ) -> Tensor:
        if self.route == "global" and self.fault == "gradients":
            query = _ScaledGradient.apply(query)
        out = TorchBackend.routed_attention(query, key, value, *given, **options)
        return self._spoilt(out, key) if self.route == "global" else out

    def select_blocks(self, query: Tensor, key: Tensor, stream: Any, **options: Any) -> Tensor:
        chosen = TorchBackend.select_blocks(query, key, stream, **options)
        if self.fault == "lazy":  # the blocks next to the sink, whatever their scores
            near = torch.arange(1, chosen.shape[-1], device=chosen.device, dtype=chosen.dtype)
            first = stream.first_blocks().repeat_interleave(stream.block)[:, None]
            chosen[..., 1:] = torch.where(chosen[..., 1:] >= 0, first + near, -1)
        if self.fault == "twice":
            chosen[..., 2] = torch.where(chosen[..., 2] >= 0, chosen[..., 1], -1)
        if self.fault == "ahead":
            own = torch.arange(stream.num_slots, device=chosen.device) // stream.block
            chosen[..., 1] = torch.where(chosen[..., 1] >= 0, own, -1)
        return chosen

    def decode_step(self, query: Tensor, cache: Any, top_k: int) -> Tensor:
        out = TorchBackend.decode_step(query, cache, top_k)
        return out * 1.05 if self.fault == "step" else out
