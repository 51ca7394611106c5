"""The routes, each computed by the back end that `backend.choose` gives.

In: queries (H, S, d), keys and values (H_kv, S, d) of a stream (see `core.layout`). Out: (H, S, d).
`global_attention` reads short documents in full and routes the long ones; `routed_attention` and
`local_attention` are what their names say.

Which documents are routed is decided for each *document*, by its own number of blocks, never for the batch.
So a document gives the same result packed with others as alone, in every mode.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dualroute.attention.backend import Backend, choose, plain
from dualroute.attention.core.arguments import (
    check_parts,
    check_rows,
    check_selected,
    check_whole,
)
from dualroute.attention.core.clusters import cell_size, gather_rows, ordered_in_blocks, regrouped
from dualroute.attention.core.layout import Stream, attend_by_length
from dualroute.attention.core.options import ROUTERS, check_clusters, check_name
from dualroute.attention.core.precision import without_autocast
from dualroute.attention.core.routing import STREAM, Routing, SharedChoice


def global_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stream: Stream,
    *,
    routing: Routing,
    max_exact_blocks: int | None,
    causal: bool = True,
    choice: SharedChoice | None = None,
) -> Tensor:
    """Full attention in documents of at most `max_exact_blocks` blocks, routed in longer ones; (H, S, d).

    With a `choice` the blocks are those that the first layer with it has chosen.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or does not fit the others.
    """
    check_rows(stream, query, key, value)
    if max_exact_blocks is not None:
        check_whole(0, max_exact_blocks=max_exact_blocks)
    if max_exact_blocks is None:
        return full_attention(query, key, value, stream, causal=causal)
    return attend_by_length(
        partial(full_attention, causal=causal),
        partial(routed_attention, routing=routing, causal=causal, choice=choice),
        query,
        key,
        value,
        stream,
        max_exact_blocks,
    )


def full_attention(
    query: Tensor, key: Tensor, value: Tensor, stream: Stream, *, causal: bool = True
) -> Tensor:
    """Exact attention inside each document, (H, S, d).

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or does not fit the others.
    """
    check_rows(stream, query, key, value)
    return _backend(stream, query, causal).full_attention(query, key, value, stream, causal=causal)


@without_autocast
def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stream: Stream,
    routing: Routing,
    *,
    causal: bool = True,
    selected: Tensor | None = None,
    choice: SharedChoice | None = None,
) -> Tensor:
    """Routed attention, (H, S, d), of a stream; `reference.routed` states what is in the softmax.

    Args:
        query: (H, S, d).
        key, value: (H_kv, S, d), 0 in slots without a token.
        stream, routing: where the documents lie; what is read.
        selected: (H_kv, S, 1 + top_k) as `select_blocks` gives it, for blocks as they stand in the text;
            chosen here when None.
        choice: where to find what was chosen, or to leave it.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or does not fit the others.
    """
    check_rows(stream, query, key, value)
    if choice is not None:
        if routing.cluster_span:
            raise ValueError(
                f"cluster_span={routing.cluster_span} with a shared choice: each layer has blocks of its own"
            )
        selected = choice.get(STREAM)
    if routing.cluster_span and selected is None:
        out = _by_similarity(query, key, value, stream, routing, causal)
        if out is not None:
            return out
    if selected is not None:
        check_selected(selected, key, stream, causal)
    else:
        selected = select_blocks(
            query.detach(),
            key.detach(),
            stream,
            top_k=routing.top_k,
            router=routing.router,
            sub_block=routing.sub_block,
            causal=causal,
        )
        if choice is not None:
            choice.put(STREAM, selected)
    backend = _backend(stream, query, causal, stream.block)
    return backend.routed_attention(query, key, value, stream, routing, selected=selected, causal=causal)


def _by_similarity(
    query: Tensor, key: Tensor, value: Tensor, stream: Stream, routing: Routing, causal: bool
) -> Tensor | None:
    """The route with blocks of similar keys; None where no document is long enough for it to matter."""
    span, cell = routing.cluster_span, cell_size(routing.router, stream.block, routing.sub_block)
    check_clusters(span, stream.block, cell, causal)
    if all(bucket.blocks <= 2 for bucket in stream.buckets):
        return None  # nobody chooses anything
    order = _backend(stream, query, causal, stream.block).similar_order
    query, key, value, wider = regrouped(query, key, value, stream, span, cell, order)
    if wider is not None:
        stream = wider.stream
    selected = select_blocks(
        query.detach(),
        ordered_in_blocks(key.detach(), stream.block, cell, order),
        stream,
        top_k=routing.top_k,
        router=routing.router,
        sub_block=routing.sub_block,
    )
    backend = _backend(stream, query, causal, stream.block)
    out = backend.routed_attention(query, key, value, stream, routing, selected=selected)
    return out if wider is None else gather_rows(out, wider.place, wider.source)


def _backend(
    stream: Stream, query: Tensor, causal: bool, block: int | None = None, *, local: bool = False
) -> Backend:
    """The back end for these queries; `block` is that of the global route."""
    if stream.grid is not None:
        if causal:
            raise ValueError("causal=True with a grid: an image has no past; use causal=False")
        # others know no squares, and take slots without a token to lie at the end of a document
        if local or stream.slot_valid is not None:
            return plain()
    return choose(query, causal=causal, block=block, copies=bool(stream.copies))


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

    A token's own block is never among them, and slots without a token choose nothing. Not causal, the
    candidates are all other blocks of the document.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or does not fit the others.
    """
    check_rows(stream, query, key)
    check_whole(0, top_k=top_k)
    check_whole(1, sub_block=sub_block)
    check_name("router", router, ROUTERS)
    check_parts(router, stream.block, sub_block)
    backend = _backend(stream, query, causal, stream.block)
    return backend.select_blocks(
        query, key, stream, top_k=top_k, router=router, sub_block=sub_block, causal=causal
    )


@without_autocast
def local_attention(
    query: Tensor, key: Tensor, value: Tensor, stream: Stream, *, window: int, causal: bool = True
) -> Tensor:
    """Sliding-window attention, (H, S, d), of a stream; `window` keys including the token's own.

    In images the window is a square: the patches nearer than `window` in both axes.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or does not fit the others.
    """
    check_rows(stream, query, key, value)
    check_whole(1, window=window)
    backend = _backend(stream, query, causal, local=True)
    return backend.local_attention(query, key, value, stream, window=window, causal=causal)
