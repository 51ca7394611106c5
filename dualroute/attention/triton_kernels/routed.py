"""Routed attention on a GPU, as one differentiable operator.

In: queries (H, S, d), keys and values (H_kv, S, d) of a stream. Out: (H, S, d), like the function of the same
name in `routed`, whose docstring says what is in the softmax. Causal only.

Saved for the backward pass: the inputs, the output, one log-sum-exp per row and the selected blocks. The
summaries of blocks are computed by torch, and their gradients flow on to keys and values by its autograd.

`torch.compile` sees two opaque operators with a known shape, however many pieces and
kernels one call consists of; nothing in them asks the GPU for a number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dualroute.attention.far_summary import summarise
from dualroute.attention.layout import Stream
from dualroute.attention.triton_kernels import routed_backward as backward_kernels
from dualroute.attention.triton_kernels import routed_forward as forward_kernels
from dualroute.attention.triton_kernels.selection import select_blocks
from dualroute.attention.triton_kernels.tiles import on_device

if TYPE_CHECKING:
    from dualroute.attention.routed import Routing


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stream: Stream,
    routing: Routing,
    *,
    causal: bool = True,
    selected: Tensor | None = None,
) -> Tensor:
    """Routed attention, (H, S, d), of a stream.

    Args:
        query: (H, S, d).
        key, value: (H_kv, S, d), 0 in slots without a token.
        stream, routing: where the documents lie; what is read.
        selected: (H_kv, S, 1 + top_k) int32 as `select_blocks` gives it; chosen here when None.

    Raises:
        ValueError: not causal.
    """
    if not causal:
        raise ValueError("causal=False has no kernel: use dualroute.attention.routed.routed_attention")
    if selected is None:
        selected = select_blocks(
            query.detach(),
            key.detach(),
            stream,
            top_k=routing.top_k,
            router=routing.router,
            sub_block=routing.sub_block,
        )
    summary = summarise(key, value, stream, routing.far_summary)
    far_keys, far_values = (
        (None, None) if summary is None else (part.to(key.dtype).contiguous() for part in summary)
    )
    out, _ = routed_forward(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        far_keys,
        far_values,
        selected.to(torch.int32).contiguous(),
        stream.first_blocks(),
    )
    return out


@torch.library.custom_op("dualroute::routed_forward", mutates_args=())
def routed_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_keys: Tensor | None,
    far_values: Tensor | None,
    selected: Tensor,
    first_block: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output (H, S, d) and log-sum-exp (H, S)."""
    with on_device(query):
        return forward_kernels.forward(query, key, value, far_keys, far_values, selected, first_block)


@routed_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_keys: Tensor | None,
    far_values: Tensor | None,
    selected: Tensor,
    first_block: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.custom_op("dualroute::routed_backward", mutates_args=())
def routed_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_keys: Tensor | None,
    far_values: Tensor | None,
    selected: Tensor,
    first_block: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, far_keys and far_values; the last two are empty without a summary."""
    with on_device(query):
        to_query, to_key, to_value, to_far_keys, to_far_values = backward_kernels.backward(
            grad, query, key, value, far_keys, far_values, selected, first_block, out, lse
        )
    if to_far_keys is None or to_far_values is None:
        to_far_keys, to_far_values = key.new_empty(0), key.new_empty(0)
    return to_query, to_key, to_value, to_far_keys, to_far_values


@routed_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_keys: Tensor | None,
    far_values: Tensor | None,
    selected: Tensor,
    first_block: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    far = [key.new_empty(0) if part is None else torch.empty_like(part) for part in (far_keys, far_values)]
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), far[0], far[1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    to_query, to_key, to_value, to_far_keys, to_far_values = routed_backward(grad.contiguous(), *inputs)
    if inputs[3] is None:
        return to_query, to_key, to_value, None, None, None, None
    return to_query, to_key, to_value, to_far_keys, to_far_values, None, None


routed_forward.register_autograd(_backward, setup_context=_save)
