"""The formulas of DualRouting, literally and slowly: the specification every fast path is tested against.

In: queries (H, n, d), keys and values (H_kv, n, d) of *one* document, rotary embedding applied (`rotate`), in
any dtype (float64 for tests). Out: (H, n, d). `per_document` lifts a route to a batch with several documents
and padding.

For one head, with scale 1/sqrt(d):

    full     o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s      over all s (causal: s <= t)
    local    the same over |t - s| < window (causal: 0 <= t - s < window)
    routed   one softmax over
               q_t . k_s / sqrt(d)           s in the own block, the first block (sink) or a selected one: v_s
               log n_b + q_t . mu_b / sqrt(d) [+ 1/2 (q_t^2) . sigma_b^2 / d]      other past blocks b: vbar_b
    clusters blocks of spans that are past hold similar keys (`regroup`), in another order for each head
    images   blocks are regions of a grid of patches, local is a square of patches (`regions`, `grid_local`)
    dual     y_t = W_O^g concat_heads(o^g_t) + W_O^l concat_heads(o^l_t)

Nothing here is shared with the fast code, not even the mean of a block. Keep it slow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over `allowed` pairs (broadcast to H, n, s); a row without any gives 0."""
    return softmax(_logits(query, key), allowed) @ value


def softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the allowed entries; all 0 where none is."""
    weights = torch.softmax(logits.masked_fill(~allowed, -torch.inf), dim=-1)
    return torch.where(allowed.any(-1, keepdim=True), weights, 0.0)


def full(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = True) -> Tensor:
    """Attention to the whole document."""
    key, value = repeat_heads(query, key, value)
    return attend(query, key, value, _pairs(query.shape[1], causal))


def local(query: Tensor, key: Tensor, value: Tensor, *, window: int, causal: bool = True) -> Tensor:
    """Attention to a window; `window` counts the token itself, on each side when not causal."""
    key, value = repeat_heads(query, key, value)
    length = query.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return attend(query, key, value, _pairs(length, causal) & (distance.abs() < window))


def grid_local(query: Tensor, key: Tensor, value: Tensor, *, height: int, width: int, window: int) -> Tensor:
    """Attention of an image of height x width patches, in raster order, to the patches nearer than `window`
    in rows and in columns (Chebyshev distance)."""
    key, value = repeat_heads(query, key, value)
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width))  # (n, 2) row, column
    distance = (place[:, None] - place).abs().amax(-1)
    return attend(query, key, value, distance < window)


def regions(height: int, width: int, region_height: int, region_width: int) -> Tensor:
    """(height * width,) the region that each patch of an image lies in, counted row by row."""
    across = math.ceil(width / region_width)
    return torch.tensor(
        [
            row // region_height * across + column // region_width
            for row in range(height)
            for column in range(width)
        ]
    )


def block_local(query: Tensor, key: Tensor, value: Tensor, *, block: int, causal: bool = True) -> Tensor:
    """Attention inside each block of a document of whole blocks: einsum('bnid,bnjd->bnij').

    Not the einsum 'bqwd,bkwd->bqwk' often shown for it: that one compares equal offsets of all blocks.
    """
    q, k, v = (rows.unflatten(1, (-1, block)) for rows in (query, *repeat_heads(query, key, value)))
    logits = torch.einsum("bnid,bnjd->bnij", q, k) / math.sqrt(q.shape[-1])
    weights = softmax(logits, _pairs(block, causal))
    return torch.einsum("bnij,bnjd->bnid", weights, v).flatten(1, 2)


def routed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block: int,
    top_k: int,
    router: str = "minmax",
    far_summary: str = "second_order",
    sub_block: int = 16,
    causal: bool = True,
    selected: Tensor | None = None,
    owner: Tensor | None = None,
) -> Tensor:
    """Own block, sink, the top_k blocks of the router (or `selected`, see `select`), and the far summary.

    `owner` (n,) is the block of each token, consecutive ones of `block` tokens by default; see `regions`.
    """
    heads, length, dim = query.shape
    kv_heads = key.shape[0]
    if owner is None:
        owner = torch.arange(length) // block
    if selected is None:
        selected = select(
            query,
            key,
            block=block,
            top_k=top_k,
            router=router,
            sub_block=sub_block,
            causal=causal,
            owner=owner,
        )
    own, past, sink = _block_relations(owner, causal)  # each (n, nb)
    read = (own | sink | selected).repeat_interleave(heads // kv_heads, 0)  # (H, n, nb)
    far = (past & ~sink & ~selected).repeat_interleave(heads // kv_heads, 0)
    key, value = repeat_heads(query, key, value)

    logits, values = [_logits(query, key)], [value]
    allowed = [read[:, :, owner] & _pairs(length, causal)]
    if far_summary != "none":
        for number in range(read.shape[2]):
            keys = key[:, owner == number]  # (H, n_b, d); the last block may be shorter
            mean, variance = keys.mean(1), keys.var(1, unbiased=False)
            logit = math.log(keys.shape[1]) + (query * mean[:, None]).sum(-1) / math.sqrt(dim)
            if far_summary == "second_order":
                logit = logit + 0.5 * (query**2 * variance[:, None]).sum(-1) / dim
            logits.append(logit[..., None])
            values.append(value[:, owner == number].mean(1, keepdim=True))
            allowed.append(far[:, :, number, None])
    weights = softmax(torch.cat(logits, -1), torch.cat(allowed, -1))
    return weights @ torch.cat(values, 1)


def clustered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block: int,
    top_k: int,
    cluster_span: int,
    router: str = "minmax",
    far_summary: str = "second_order",
    sub_block: int = 16,
) -> Tensor:
    """`routed`, causal, on blocks of similar keys: what is past is read in the order of `past_order`."""
    how: dict[str, Any] = {"block": block, "router": router, "sub_block": sub_block}
    cell = sub_block if router == "minmax" else block
    outputs = []
    for begin in range(0, query.shape[1], block):  # the tokens of a block see the same order
        end = min(query.shape[1], begin + block)
        orders = [
            past_order(key, begin, block, cluster_span, cell, inside=inside) for inside in (False, True)
        ]
        seen, bounded = (order[:, :end, None] for order in orders)
        chosen = select(query[:, :end], key.take_along_dim(bounded, 1), top_k=top_k, **how)
        keys, values = (rows.take_along_dim(seen, 1) for rows in (key, value))
        out = routed(
            query[:, :end], keys, values, top_k=top_k, far_summary=far_summary, selected=chosen, **how
        )
        outputs.append(out[:, begin:])
    return torch.cat(outputs, dim=1)


def past_order(
    key: Tensor, begin: int, block: int, cluster_span: int, cell: int, *, inside: bool = False
) -> Tensor:
    """(H_kv, n) the order in which tokens of the block that begins at `begin` see keys (H_kv, n, d).

    What lies behind the first block is cut into spans of `cluster_span` tokens while these are past, the rest
    into quarters of a span, and so on; each is regrouped, single blocks `inside` only.
    """
    order = [torch.arange(min(block, key.shape[1])).expand(key.shape[0], -1)]
    place, span = block, cluster_span
    while place < begin:
        while place + span > begin:
            span = max(block, span // 4)
        numbers = regroup(key[:, place : place + span], cell) + place
        if span == block and not inside:
            numbers = torch.arange(place, place + span).expand(key.shape[0], -1)
        order.append(numbers)
        place += span
    rest = torch.arange(min(place, key.shape[1]), key.shape[1]).expand(key.shape[0], -1)
    return torch.cat([*order, rest], dim=1)


def regroup(keys: Tensor, cell: int) -> Tensor:
    """(H_kv, n) the order of keys (H_kv, n, d) in which neighbouring cells of `cell` hold similar ones.

    Halves at the median of the channel that varies most, halved again; of equal values the earlier first.
    """

    def halves(keys: Tensor, numbers: Tensor) -> Tensor:
        if len(numbers) == cell:
            return numbers
        channel = keys[numbers].var(0, unbiased=False).argmax()
        numbers = numbers[torch.sort(keys[numbers, channel], stable=True).indices]
        half = len(numbers) // 2
        return torch.cat([halves(keys, part.sort().values) for part in (numbers[:half], numbers[half:])])

    return torch.stack([halves(head, torch.arange(keys.shape[1])) for head in keys.detach()])


def select(
    query: Tensor,
    key: Tensor,
    *,
    block: int,
    top_k: int,
    router: str = "minmax",
    sub_block: int = 16,
    causal: bool = True,
    owner: Tensor | None = None,
) -> Tensor:
    """(H_kv, n, nb) True at the top_k candidates of each token: past blocks except the sink.

    Query heads that share a key head choose together: their scores are summed. Scores are compared as
    float32, the earlier of two equal blocks wins.
    """
    if owner is None:
        owner = torch.arange(query.shape[1]) // block
    _, past, sink = _block_relations(owner, causal)
    scores = [
        block_score(query, key[:, owner == number], router, sub_block) for number in range(past.shape[1])
    ]
    ranking = torch.stack(scores, -1).float()  # (H_kv, n, nb)
    ranking = ranking.masked_fill(~(past & ~sink), -torch.inf)
    order = torch.sort(ranking, dim=-1, descending=True, stable=True).indices[..., :top_k]
    selected = torch.zeros_like(ranking, dtype=torch.bool).scatter(-1, order, True)
    return selected & past & ~sink


def block_score(query: Tensor, keys: Tensor, router: str, sub_block: int = 16) -> Tensor:
    """Scores (H_kv, n) of queries (H, n, d) for one block of keys (H_kv, n_b, d)."""
    dim = query.shape[-1]
    query = query.unflatten(0, (keys.shape[0], -1))  # (H_kv, group, n, d)
    mean = keys.mean(1)[:, None, None]  # (H_kv, 1, 1, d)
    if router == "mean":
        return (query * mean).sum(-1).sum(1)
    if router == "moment":
        variance = keys.var(1, unbiased=False)[:, None, None]
        score = (query * mean).sum(-1) / math.sqrt(dim) + 0.5 * (query**2 * variance).sum(-1) / dim
        return score.sum(1)
    if router != "minmax":
        raise ValueError(f"router={router} is unknown")
    bounds = []
    for part in keys.split(sub_block, dim=1):
        low, high = part.amin(1)[:, None, None], part.amax(1)[:, None, None]
        bounds.append(torch.maximum(query * low, query * high).sum(-1).sum(1))
    return torch.stack(bounds).amax(0)


def dual(global_heads: Tensor, local_heads: Tensor, global_weight: Tensor, local_weight: Tensor) -> Tensor:
    """y (n, dim) from the heads (H, n, d) and weights (dim, H d) of both routes; H may differ."""
    return (
        global_heads.transpose(0, 1).flatten(1) @ global_weight.T
        + local_heads.transpose(0, 1).flatten(1) @ local_weight.T
    )


def rotate(rows: Tensor, positions: Tensor, theta: float = 10000.0, channels: int | None = None) -> Tensor:
    """Rotary embedding of rows (H, n, d) at positions (n,), by complex multiplication.

    Of the pairs (x_i, x_{i + d/2}) those of i < channels/2 are turned, by theta^(-2i/channels) for each
    position; all by default.
    """
    dim = rows.shape[-1]
    channels = dim if channels is None else channels
    if channels == 0:
        return rows
    pairs = torch.complex(*rows.double().chunk(2, -1))
    frequency = theta ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angle = positions.double()[:, None] * frequency
    turned = pairs[..., : channels // 2] * torch.polar(torch.ones_like(angle), angle)
    pairs = torch.cat([turned, pairs[..., channels // 2 :]], -1)
    return torch.cat([pairs.real, pairs.imag], -1).to(rows.dtype)


def grid_rotate(
    rows: Tensor, height: int, width: int, theta: float = 10000.0, channels: int | None = None
) -> Tensor:
    """Rotary embedding of the patches (H, height * width, d) of an image, raster order: the pairs
    (x_i, x_{i + d/2}) of i < d/4 are turned by the row, the others by the column; with r `channels` those of
    i < r/4 by the row, those up to r/2 by the column, and the rest stay."""
    dim = rows.shape[-1]
    if channels is not None and channels < dim:
        first, second = rows.chunk(2, -1)
        half = channels // 2
        turned = grid_rotate(torch.cat([first[..., :half], second[..., :half]], -1), height, width, theta)
        x, y = turned.chunk(2, -1)
        return torch.cat([x, first[..., half:], y, second[..., half:]], -1)
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    quarters = rows.chunk(4, -1)
    by_row = rotate(torch.cat(quarters[0::2], -1), place[:, 0], theta).chunk(2, -1)
    by_column = rotate(torch.cat(quarters[1::2], -1), place[:, 1], theta).chunk(2, -1)
    return torch.cat([by_row[0], by_column[0], by_row[1], by_column[1]], -1)


def per_document(
    route: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, documents: Tensor
) -> Tensor:
    """Apply `route` to each document: query (B, H, n, d), key, value (B, H_kv, n, d) -> (B, H, n, d).

    documents (B, n) numbers the document of each token, -1 = padding, whose result is 0.
    """
    out = torch.zeros_like(query)
    for number in documents.unique().tolist():
        if number < 0:
            continue
        for row in range(len(documents)):
            tokens = (documents[row] == number).nonzero()[:, 0]
            if len(tokens):
                result = route(query[row][:, tokens], key[row][:, tokens], value[row][:, tokens])
                place = torch.zeros_like(out)
                place[row][:, tokens] = result
                out = out + place
    return out


def repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (H_kv, n, d) repeated for the query heads that share them: (H, n, d)."""
    group = query.shape[0] // key.shape[0]
    return key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)


def _logits(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])


def _pairs(length: int, causal: bool) -> Tensor:
    everything = torch.ones(length, length, dtype=torch.bool)
    return everything.tril() if causal else everything


def _block_relations(owner: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(n, nb) each: is this the token's own block, a past one (not causal: any other one), the sink?"""
    number = torch.arange(int(owner.max()) + 1)
    token = owner[:, None]
    own = token == number
    past = number < token if causal else ~own
    return own, past, past & (number == 0)
