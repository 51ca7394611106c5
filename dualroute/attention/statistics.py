"""What the router does, in a few numbers, from a small sample of tokens.

In: queries and keys of a global route on a stream. Out: a dict of 0-dim tensors for the monitor:
`router_entropy`, how evenly blocks are chosen (1 = all candidates equally often, 0 = always the same one),
and the shares of softmax mass on the token's `mass_own` block, on the sink, on the selected blocks and on
what is far. On demand also `block_map`, the mean mass that the tokens of each block of the longest document
give to each block of it.

In full mode they exist as well. They tell what the router would choose, and so how much
mass routing would still read exactly, before one turns it on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dualroute.attention.core.clusters import cell_size, ordered_in_blocks, regrouped, similar_order
from dualroute.attention.core.far_summary import far_query_features, summarise
from dualroute.attention.core.layout import Stream
from dualroute.attention.core.precision import NEG_INF
from dualroute.attention.core.router import block_features, block_scores, top_blocks
from dualroute.attention.core.routing import STREAM, Routing, SharedChoice

MAX_ROWS = 256  # sampled tokens
MAX_BINS = 64  # rows and columns of a map
MAX_LOGITS = 1 << 24  # logits held at once; fewer tokens are sampled where a row of them is long


@torch.no_grad()
def routing_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stream: Stream,
    routing: Routing,
    *,
    max_exact_blocks: int | None,
    causal: bool,
    block_map: bool = False,
    choice: SharedChoice | None = None,
) -> dict[str, Tensor]:
    """Statistics of the global route of queries (H, S, d), keys and values (H_kv, S, d).

    Tokens in documents of at most `max_exact_blocks` blocks (None: all) have their far mass measured on the
    keys themselves, the others on the pseudo-keys they really read. `block_map` adds (rows, columns) of that
    name: blocks of queries and of keys, neighbours together where there are more than `MAX_BINS`; NaN where
    no token was sampled. What another layer has chosen is taken from the `choice`.
    """
    kv_heads, block = key.shape[0], stream.block
    slots, bounded = _sample(stream, len(query)), key.float()
    if routing.cluster_span:
        cell = cell_size(routing.router, block, routing.sub_block)
        query, key, value, spread = regrouped(
            query, key, value, stream, routing.cluster_span, cell, similar_order
        )
        if spread is not None:
            stream, slots = spread.stream, spread.place[slots]
        bounded = ordered_in_blocks(key.float(), block, cell, similar_order)
    own = slots // block  # (rows,)
    number = torch.arange(stream.num_blocks, device=key.device)
    in_document = stream.block_in_document()
    document = (in_document == 0).cumsum(0)
    same = document == document[own][:, None]  # (rows, nb)
    past = same & ((number < own[:, None]) if causal else (number != own[:, None]))
    if stream.copies:
        for begin, end in stream.hidden_blocks()[1:, own].unflatten(0, (-1, 2)):
            past &= (number < begin[:, None]) | (number >= end[:, None])
    sink = past & (in_document == 0)
    candidates = past & ~sink

    rows = query.index_select(1, slots).unflatten(0, (kv_heads, -1)).float()  # (H_kv, group, rows, d)
    keys = key.float()
    valid = stream.slot_valid.view(-1, block) if stream.slot_valid is not None and not causal else None
    blocks = bounded.unflatten(1, (-1, block))
    scores = block_scores(
        rows, block_features(blocks, routing.router, routing.sub_block, valid), routing.router
    )
    chosen = (
        top_blocks(scores, candidates, routing.top_k)
        if routing.top_k
        else slots.new_empty(kv_heads, len(slots), 0)
    )
    shared = None if choice is None else choice.get(STREAM)
    if shared is not None:  # of the documents that are routed, the last ones of the stream
        before = stream.num_slots - shared.shape[1]
        others = shared[:, (slots - before).clamp_min(0), 1:].long()
        others = torch.where(others < 0, -1, others + before // block)
        chosen = torch.where((slots < before)[:, None], chosen, others)
    selected = torch.zeros(kv_heads, len(slots), stream.num_blocks + 1, dtype=torch.bool, device=key.device)
    selected.scatter_(-1, torch.where(chosen < 0, stream.num_blocks, chosen), True)
    selected = selected[..., :-1]

    logits = rows @ keys[:, None].transpose(-1, -2) / math.sqrt(key.shape[-1])  # (H_kv, group, rows, S)
    slot = torch.arange(stream.num_slots, device=key.device)
    hidden = ~(past | (number == own[:, None])).repeat_interleave(block, dim=1)
    if causal:
        hidden |= slot > slots[:, None]
    elif stream.slot_valid is not None:
        hidden |= ~stream.slot_valid
    mass = (
        logits.masked_fill_(hidden, NEG_INF).unflatten(-1, (-1, block)).logsumexp(-1)
    )  # log mass of each block
    far = candidates & ~selected  # (H_kv, rows, nb)
    if max_exact_blocks is not None:
        routed = (stream.blocks_in_document()[own] > max_exact_blocks)[:, None]
        pseudo = torch.full_like(mass, NEG_INF)
        summary = summarise(keys, value.float(), stream, routing.far_summary, causal)
        if summary is not None:
            features = far_query_features(rows, summary.keys.shape[-1])
            pseudo = features @ summary.keys[:, None].transpose(-1, -2) + stream.tokens_in_block().log()
        mass = torch.where((far & routed)[:, None], pseudo, mass)
    mass = mass.softmax(-1)  # (H_kv, group, rows, nb)

    def share(where: Tensor) -> Tensor:
        return (mass * where).sum(-1).mean()

    found = {} if not block_map else {"block_map": _block_map(mass.mean((0, 1)), own, stream)}
    return found | {
        "router_entropy": _entropy(selected, candidates),
        "mass_own": share(number == own[:, None]),
        "mass_sink": share(sink),
        "mass_selected": share((selected & candidates)[:, None]),
        "mass_far": share(far[:, None]),
    }


def _sample(stream: Stream, heads: int) -> Tensor:
    """Slots of evenly spaced tokens: the same ones every time."""
    rows = max(1, min(MAX_ROWS, MAX_LOGITS // (stream.num_slots * heads)))
    if stream.slot_valid is None:
        tokens = torch.arange(stream.num_slots, device=stream.device)
    else:
        tokens = stream.slot_valid.nonzero()[:, 0]
    rows = min(rows, len(tokens))
    return tokens[
        torch.linspace(0, len(tokens) - 1, rows, dtype=torch.float64, device=stream.device).round().long()
    ]


def _block_map(mass: Tensor, own: Tensor, stream: Stream) -> Tensor:
    """Mean mass (rows, nb) of the sampled tokens, by blocks of the last document, which is the longest."""
    blocks = stream.buckets[-1].blocks
    first = stream.num_blocks - blocks
    inside = own >= first
    together = -(-blocks // MAX_BINS)
    bins = -(-blocks // together)
    columns = torch.nn.functional.pad(mass[inside, first:], (0, bins * together - blocks))
    columns = columns.unflatten(-1, (bins, together)).sum(-1)  # (rows, bins)
    place = (own[inside] - first) // together
    total = columns.new_zeros(bins, bins).index_add_(0, place, columns)
    return total / torch.bincount(place, minlength=bins)[:, None]  # 0 / 0 is NaN


def _entropy(selected: Tensor, candidates: Tensor) -> Tensor:
    """Entropy of how often each block is chosen over that of a uniform choice; 1 without any choice."""
    offered = int(candidates.any(0).sum())
    counts = (selected & candidates).sum(1).float()  # (H_kv, nb)
    if offered < 2 or not bool(counts.any()):
        return torch.ones((), device=selected.device)
    share = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    return (torch.special.entr(share).sum(-1) / math.log(offered)).mean()
