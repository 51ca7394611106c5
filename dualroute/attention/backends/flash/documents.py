"""Whole documents and windows: one call of flash attention for all documents of a stream, of any sizes.

In: queries (H, S, d), keys and values (H_kv, S, d) of a stream. Out: (H, S, d), the local route or full
attention; `window` keys including the token's own, None = all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualroute.attention.backends.flash.operators import Spans, backward, forward
from dualroute.attention.core.layout import Stream
from dualroute.attention.core.precision import without_autocast


def document_spans(stream: Stream, window: int | None, causal: bool) -> Spans:
    """Each document with itself. Not causal, the slots that fill it up are a sequence of their own."""
    starts = stream.document_slots(tokens_only=not causal)
    longest = max((bucket.blocks for bucket in stream.buckets), default=0) * stream.block
    left = -1 if window is None or window > longest else window - 1
    return Spans(starts, starts, longest, longest, left, 0 if causal else left)


@without_autocast
def attend_documents(
    query: Tensor, key: Tensor, value: Tensor, stream: Stream, *, window: int | None, causal: bool
) -> Tensor:
    """Attention inside each document, (H, S, d)."""
    return _Documents.apply(query, key, value, document_spans(stream, window, causal))


class _Documents(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        rows = [part.transpose(0, 1) for part in (query, key, value)]  # (S, heads, d) views
        out, lse = forward(rows[0], rows[1], rows[2], spans)
        ctx.save_for_backward(*rows, out, lse, spans.query)
        ctx.sizes = spans[2:]
        return out.transpose(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, starts = ctx.saved_tensors
        spans = Spans(starts, starts, *ctx.sizes)
        to_rows = backward(grads[0].transpose(0, 1), query, key, value, out, lse, spans)
        return *(part.transpose(0, 1) for part in to_rows), None
