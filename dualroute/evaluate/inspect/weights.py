"""The attention of one layer as weights, which the fast routes never hold: dense, slow, for one short text.

In: queries, keys and values of a route, as :meth:`DualRouting.stream_heads` makes them, of one document.
Out: what each token gives to each key, and the heads' outputs, which are those of the layer itself.  The
choice of blocks is made by the router's own functions; a block may be switched off, so that no later token
reads it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.attention.core.far_summary import far_keys, far_query_features
from dualroute.attention.core.router import block_features, block_scores, token_mean, top_blocks
from dualroute.attention.core.routing import STREAM, SharedChoice
from dualroute.attention.layer import DualRouting

#: How a token reads a block.
NOT_READ, OWN, SINK, SELECTED, FAR, IN_FULL = range(6)
KINDS = ("not read", "own", "sink", "selected", "far summary", "in full")


class GlobalWeights(NamedTuple):
    """What n tokens give to n keys in nb blocks.

    Attributes:
        keys: (H, n, n) weights of the keys that are read exactly.
        far: (H, n, nb) weights of the blocks that are read as a summary.
        full: (H, n, n) weights of full attention with the same queries and keys.
        kinds: (H, n, nb) how each block is read, see `KINDS`.
        outputs: (H, n, d) of the heads, before gate and output projection.
    """

    keys: Tensor
    far: Tensor
    full: Tensor
    kinds: Tensor
    outputs: Tensor


def global_weights(
    layer: DualRouting,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    length: int,
    off: int | None = None,
    choice: SharedChoice | None = None,
) -> GlobalWeights:
    """The global route of queries (H, S, d), keys and values (H_kv, S, d) of one document.

    Args:
        layer: Whose route it is; it must be causal.
        length: Tokens, the first of S slots.
        off: Number of a block that no token behind it reads.
        choice: What the layer shares with others; the first of them leaves what it chooses.
    """
    query, key, value = _wide(query, key, value)
    shared = None if choice is None else choice.get(STREAM)
    parts, found = [], []
    for head in range(key.shape[0]):  # one at a time: n x n weights of all heads would be too many
        rows = query[head * layer.group : (head + 1) * layer.group]
        given = None if shared is None else shared[head, :length, 1:].long()
        part, chosen = _of_key_head(layer, rows, key[head], value[head], length, off, given)
        parts.append(part)
        found.append(chosen)
    if choice is not None and shared is None and found[0] is not None:
        choice.put(STREAM, F.pad(torch.stack(found), (1, 0)))  # type: ignore[arg-type]
    return GlobalWeights(*(torch.cat(some) for some in zip(*parts, strict=True)))


def _of_key_head(
    layer: DualRouting,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    length: int,
    off: int | None,
    chosen: Tensor | None,
) -> tuple[GlobalWeights, Tensor | None]:
    """Of the queries (group, n, d) of a key head; and the blocks (n, k) that were chosen, -1 = none."""
    block, routing = layer.block, layer.routing
    place = torch.arange(length, device=key.device)
    own = place // block
    number = torch.arange(-(-length // block), device=key.device)
    past = number < own[:, None]  # (n, nb)
    open_blocks = past & (number != off) if off is not None else past
    causal = place <= place[:, None]
    logits = query[:, :length] @ key[:length].T / math.sqrt(key.shape[-1])  # (group, n, n)
    readable = causal & (open_blocks | (number == own[:, None]))[:, own]
    full = logits.masked_fill(~readable, -torch.inf).softmax(-1)
    limit = layer.max_exact_blocks
    if limit is None or len(number) <= limit:
        kinds = torch.where(open_blocks, IN_FULL, NOT_READ)
        kinds = torch.where(number == own[:, None], OWN, kinds).expand(len(query), -1, -1)
        far = logits.new_zeros(len(query), length, len(number))
        return GlobalWeights(full, far, full, kinds, full @ value[:length]), None
    blocks = key.unflatten(0, (-1, block))[None]  # (1, nb, block, d); the last may hold slots without a token
    scores = block_scores(
        query[None, :, :length], block_features(blocks, routing.router, routing.sub_block), routing.router
    )
    if chosen is None:
        chosen = top_blocks(scores, open_blocks & (number > 0), routing.top_k)[0]  # (n, k)
    selected = torch.zeros(length, len(number) + 1, dtype=torch.bool, device=key.device)
    selected.scatter_(-1, torch.where(chosen < 0, len(number), chosen), True)
    selected = selected[:, :-1]
    kinds = torch.where(open_blocks, FAR, NOT_READ)
    kinds = torch.where(selected, SELECTED, kinds)
    kinds = torch.where(open_blocks & (number == 0), SINK, kinds)
    kinds = torch.where(number == own[:, None], OWN, kinds)
    exact = (kinds != FAR) & (kinds != NOT_READ)
    logits = logits.masked_fill(~(causal & exact[:, own]), -torch.inf)
    far = torch.full_like(scores[0], -torch.inf).expand(len(query), -1, -1).to(logits.dtype)
    summary_values = token_mean(value.unflatten(0, (-1, block)))[: len(number)].to(value.dtype)
    if routing.far_summary == "none":
        kinds = torch.where(kinds == FAR, NOT_READ, kinds)
    else:
        pseudo = far_keys(blocks[0], routing.far_summary)
        features = far_query_features(query[:, :length], pseudo.shape[-1])
        far = (features @ pseudo.T + math.log(block)).to(logits.dtype)
        far = far.masked_fill(kinds != FAR, -torch.inf)
    weights = torch.cat([logits, far], -1).softmax(-1)
    keys, far = weights.split([length, len(number)], -1)
    outputs = keys @ value[:length] + far @ summary_values
    return GlobalWeights(keys, far, full, kinds.expand(len(query), -1, -1), outputs), chosen


def local_weights(
    layer: DualRouting, query: Tensor, key: Tensor, value: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """The local route: weights (H, n, w) of the keys 0, 1, … w - 1 tokens back, and the outputs (H, n, d)."""
    query, key, value = _wide(query, key, value)
    place = torch.arange(length, device=key.device)
    back = place[:, None] - place
    key, value = (rows[:, :length].repeat_interleave(layer.group, 0) for rows in (key, value))  # (H, n, d)
    logits = query[:, :length] @ key.transpose(-1, -2) / math.sqrt(key.shape[-1])
    weights = logits.masked_fill((back < 0) | (back >= layer.window), -torch.inf).softmax(-1)
    width = min(layer.window, length)
    at = place[:, None] - torch.arange(width, device=key.device)  # (n, w)
    band = weights.gather(-1, at.clamp_min(0).expand(len(weights), -1, -1))
    return band.masked_fill(at < 0, 0), weights @ value


def _wide(*rows: Tensor) -> tuple[Tensor, ...]:
    """In float32 at least."""
    return tuple(part.to(torch.promote_types(part.dtype, torch.float32)) for part in rows)


def by_block(weights: Tensor, block: int) -> Tensor:
    """Weights (…, n) of keys → (…, nb) of their blocks."""
    missing = -weights.shape[-1] % block
    return torch.nn.functional.pad(weights, (0, missing)).unflatten(-1, (-1, block)).sum(-1)
