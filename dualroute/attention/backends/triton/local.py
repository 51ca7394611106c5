"""The local route on a GPU: exact sliding-window attention, forward and backward.

In: queries (H, S, d), keys and values (H_kv, S, d) of a stream. Out: (H, S, d), like the function of the same
name in `local_route`:
o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s over 0 <= t - s < window (causal) or |t - s| < window, in one
document.

Documents are two numbers per slot, where its document begins and ends. A batch of one
long text and a batch of a thousand short ones run through the same loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualroute.attention.backends.triton import windowed
from dualroute.attention.backends.triton.gradients import softmax_delta
from dualroute.attention.backends.triton.tiles import document_slots, on_device
from dualroute.attention.core.layout import Stream


def local_attention(
    query: Tensor, key: Tensor, value: Tensor, stream: Stream, *, window: int, causal: bool = True
) -> Tensor:
    """Sliding-window attention, (H, S, d), of a stream; `window` keys including the token's own."""
    # Causal rows see no slot behind them, so it does not matter whether it holds a token.
    begin, end = document_slots(stream, tokens_only=not causal)
    out, _ = local_forward(
        query.contiguous(), key.contiguous(), value.contiguous(), begin, end, window, causal
    )
    return out


@torch.library.custom_op("dualroute::local_forward", mutates_args=())
def local_forward(
    query: Tensor, key: Tensor, value: Tensor, begin: Tensor, end: Tensor, window: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output (H, S, d) and log-sum-exp (H, S)."""
    with on_device(query):
        return windowed.forward(query, key, value, begin, end, window, causal)


@local_forward.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.custom_op("dualroute::local_backward", mutates_args=())
def local_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    begin: Tensor, end: Tensor, window: int, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values."""
    with on_device(query):
        parts = (grad, query, key, value, lse, softmax_delta(grad, out), begin, end, window, causal)
        return windowed.query_gradient(*parts), *windowed.key_gradients(*parts)


@local_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, begin, end, ctx.window, ctx.causal = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, begin, end)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse, begin, end = ctx.saved_tensors
    grads = local_backward(grad.contiguous(), query, key, value, out, lse, begin, end, ctx.window, ctx.causal)
    return *grads, None, None, None, None


local_forward.register_autograd(_backward, setup_context=_save)
