"""The routes on a CPU: differentiable functions around the C++ operators.

In: queries (H, S, d), keys and values (H_kv, S, d) of a stream. Out: like the functions of the same names in
`router`, `routed` and `local_route`, whose docstrings hold the formulas.

Saved for the backward pass: the inputs, the output, one log-sum-exp per row, the summaries of the blocks and
the selected ones. Half precision is computed in float32, tile by tile; bfloat16 is multiplied as
it is where the processor has a matrix unit (`operators.use_unit`).

Nothing is sorted or gathered in memory, as it must be in plain torch. A tile of gathered
rows, its weights and their gradients live and die in the first-level cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.attention.backends.cpp import operators
from dualroute.attention.backends.cpp.operators import block_tables, compute_dtype, pad_heads
from dualroute.attention.core.arguments import check_parts, check_rows, check_whole
from dualroute.attention.core.far_summary import Summary, summarise_backward
from dualroute.attention.core.layout import Stream
from dualroute.attention.core.router import block_features

if TYPE_CHECKING:
    from dualroute.attention.core.routing import Routing


@torch.no_grad()
def select_blocks(
    query: Tensor,
    key: Tensor,
    stream: Stream,
    *,
    top_k: int,
    router: str = "minmax",
    sub_block: int = 16,
    causal: bool = True,
) -> Tensor:
    """(H_kv, S, 1 + top_k) int32 blocks of the stream: the sink, then the chosen ones; -1 = none.

    Raises:
        TypeError, ValueError: as of the function of the same name in `attention.routes`.
    """
    _check(stream, query, key)
    check_whole(0, top_k=top_k)
    check_whole(1, sub_block=sub_block)
    check_parts(router, stream.block, sub_block)
    scale = 1 / math.sqrt(query.shape[-1])
    # Causal, a part of a block that is not full may have wild bounds: only complete blocks are candidates.
    valid = None if causal or stream.slot_valid is None else stream.slot_valid.view(-1, stream.block)
    rows = pad_heads(key)
    if router != "minmax":  # sums, other than bounds, are not exact in half precision
        rows = _computed(rows)
    features = _computed(block_features(rows.unflatten(1, (-1, stream.block)), router, sub_block, valid))
    kv_heads, blocks, parts, width = features.shape
    columns = 16 * max(1, 4 // parts)  # blocks that are scored at once
    padded = F.pad(features, (0, 0, 0, 0, 0, -blocks % columns))
    tiles = padded.view(kv_heads, -1, columns, parts, width).permute(0, 1, 4, 3, 2).contiguous()
    tables = block_tables(stream, causal)
    selected = operators.select(pad_heads(query), tiles, tables, top_k=top_k, router=router, scale=scale)
    if stream.slot_valid is not None:
        selected.masked_fill_(~stream.slot_valid[:, None], -1)
    return selected


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stream: Stream,
    routing: Routing,
    *,
    selected: Tensor,
    causal: bool = True,
) -> Tensor:
    """Routed attention, (H, S, d), of a stream; see the function of the same name in `routed`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or does not fit the others, or `selected` has
            a block that a token may not read.
    """
    _check(stream, query, key, value)
    if selected.ndim != 3 or selected.shape[:2] != key.shape[:2] or selected.is_floating_point():
        raise ValueError(
            f"selected is {selected.dtype} {tuple(selected.shape)}: give whole numbers "
            f"({len(key)}, {key.shape[1]}, 1 + top_k), as select_blocks does"
        )
    rows = (part.contiguous() for part in (query, key, value))
    chosen = selected.to(torch.int32).contiguous()
    return _Routed.apply(*rows, chosen, stream, routing.far_summary, causal)


def local_attention(
    query: Tensor, key: Tensor, value: Tensor, stream: Stream, *, window: int, causal: bool = True
) -> Tensor:
    """Sliding-window attention, (H, S, d), of a stream; `window` keys including the token's own, not causal
    so many to each side.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or does not fit the others.
    """
    _check(stream, query, key, value)
    check_whole(1, window=window)
    rows = (part.contiguous() for part in (query, key, value))
    return _Local.apply(*rows, block_tables(stream, causal), min(window, stream.num_slots))


def _check(stream: Stream, query: Tensor, *others: Tensor) -> None:
    check_rows(stream, query, *others)
    if query.device.type != "cpu":
        raise ValueError(f"query is on {query.device}: these kernels read the memory of a CPU")


def _padded(*rows: Tensor) -> Iterator[Tensor]:
    return map(pad_heads, rows)


def _computed(rows: Tensor) -> Tensor:
    return rows.to(compute_dtype(rows))


def _unpadded(gradients: Iterable[Tensor], query: Tensor) -> Iterator[Tensor]:
    return (rows[..., : query.shape[-1]].to(query.dtype) for rows in gradients)


class _Routed(torch.autograd.Function):
    """The joint softmax over a token's own block, its selected blocks and the summaries of the others."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        selected: Tensor,
        stream: Stream,
        far_summary: str,
        causal: bool,
    ) -> Tensor:
        dim = query.shape[-1]
        q, k, v = _padded(query, key, value)
        tables = block_tables(stream, causal)
        far = operators.summarise(k, v, tables, far_summary)
        out, lse = operators.routed_forward(q, k, v, far, selected, tables, 1 / math.sqrt(dim))
        out = out[..., :dim].to(query.dtype)
        ctx.stream, ctx.causal = stream, causal
        ctx.save_for_backward(query, key, value, selected, out, lse, *(far or ()))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, selected, out, lse, *summary = ctx.saved_tensors
        far = Summary(*summary) if summary else None
        grad, q, k, v, o = _padded(grads[0], query, key, value, out)
        tables, scale = block_tables(ctx.stream, ctx.causal), 1 / math.sqrt(query.shape[-1])
        to_query, to_key, to_value, to_far = operators.routed_backward(
            grad, q, k, v, far, selected, o, lse, tables, scale
        )
        if far is not None and to_far is not None:
            summarise_backward(to_far, far, _computed(k), ctx.stream, ctx.causal, to_key, to_value)
        return *_unpadded((to_query, to_key, to_value), query), None, None, None, None


class _Local(torch.autograd.Function):
    """The softmax over the window."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tables: Tensor, window: int) -> Tensor:
        dim = query.shape[-1]
        q, k, v = _padded(query, key, value)
        out, lse = operators.local_forward(q, k, v, tables, window, 1 / math.sqrt(dim))
        out = out[..., :dim].to(query.dtype)
        ctx.window = window
        ctx.save_for_backward(query, key, value, out, lse, tables)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, tables = ctx.saved_tensors
        grad, q, k, v, o = _padded(grads[0], query, key, value, out)
        scale = 1 / math.sqrt(query.shape[-1])
        to_rows = operators.local_backward(grad, q, k, v, o, lse, tables, ctx.window, scale)
        return *_unpadded(to_rows, query), None, None
