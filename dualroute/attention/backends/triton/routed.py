"""Routed attention on a GPU, as one differentiable operator.

In: queries (H, S, d), keys and values (H_kv, S, d) of a stream. Out: (H, S, d), like the function of the same
name in `routed`, whose docstring says what is in the softmax.

Saved for the backward pass: the inputs, the output, one log-sum-exp per row and the selected blocks. The
summaries of blocks are computed by torch, and their gradients flow on to keys and values by its autograd.

`torch.compile` sees two opaque operators with a known shape, however many pieces and
kernels one call consists of; nothing in them asks the GPU for a number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualroute.attention.backends.triton.routed_backward import routed_backward
from dualroute.attention.backends.triton.routed_forward import routed_forward
from dualroute.attention.backends.triton.selection import select_blocks
from dualroute.attention.backends.triton.tiles import block_places
from dualroute.attention.core.far_summary import summarise
from dualroute.attention.core.layout import Stream
from dualroute.attention.core.routing import Routing


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
    """
    if selected is None:
        selected = select_blocks(
            query.detach(),
            key.detach(),
            stream,
            top_k=routing.top_k,
            router=routing.router,
            sub_block=routing.sub_block,
            causal=causal,
        )
    summary = summarise(key, value, stream, routing.far_summary, causal)
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
        block_places(stream),
        causal,
    )
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    to_query, to_key, to_value, to_far_keys, to_far_values = routed_backward(
        grad.contiguous(), *inputs, ctx.causal
    )
    if inputs[3] is None:
        return to_query, to_key, to_value, None, None, None, None, None
    return to_query, to_key, to_value, to_far_keys, to_far_values, None, None, None


routed_forward.register_autograd(_backward, setup_context=_save)
