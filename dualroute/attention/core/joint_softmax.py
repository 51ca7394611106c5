"""The softmax of the routed route where all its logits are at hand: over exact keys and pseudo-keys at once.

In: queries (R, group, m, d), keys, values and block statistics of their rows, R = batch * H_kv. Out: (R,
group, m, d). A step of decoding, a chunk of a prompt and the graph that is exported end here; training merges
parts instead, see `backends.torch.routed`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dualroute.attention.core.far_summary import far_query_features
from dualroute.attention.core.precision import NEG_INF, accumulation_dtype


class Past(NamedTuple):
    """What a row of queries may read: keys (R, s, d) and values (R, s, d), closed where a mask says so, and
    pseudo-keys (R, nb, f) with their values (R, nb, d) of blocks of `block` tokens, None without summary.
    Where the last block counts too, which may be shorter, they have `sizes` (nb,) tokens."""

    keys: Tensor
    values: Tensor
    far_keys: Tensor | None
    far_values: Tensor | None
    block: int
    sizes: Tensor | None = None


def joint_softmax(query: Tensor, past: Past, hidden: Tensor, not_far: Tensor) -> Tensor:
    """One softmax over all of it; (R, group, m, d) in the type of the queries.

    Args:
        query: (R, group, m, d).
        past: what is read.
        hidden: (R or 1, m, s), True where a query must not see a key.
        not_far: (R or 1, m, nb), True where a block is not read through its pseudo-key.
    """
    wide = query.to(accumulation_dtype(query.dtype))
    logits = wide @ past.keys[:, None].to(wide.dtype).transpose(-1, -2) / math.sqrt(query.shape[-1])
    logits, values = logits.masked_fill(hidden[:, None], NEG_INF), past.values.to(wide.dtype)
    if past.far_keys is not None and past.far_values is not None:
        features = far_query_features(query, past.far_keys.shape[-1])
        pseudo_keys = past.far_keys[:, None].to(features.dtype)
        far = features @ pseudo_keys.transpose(-1, -2)
        far = far + (math.log(past.block) if past.sizes is None else past.sizes.to(far.dtype).log())
        logits = torch.cat([logits, far.masked_fill(not_far[:, None], NEG_INF)], dim=-1)
        values = torch.cat([values, past.far_values.to(wide.dtype)], dim=1)
    return (logits.softmax(-1) @ values[:, None]).to(query.dtype)


def routed_by_mask(query: Tensor, past: Past, read: Tensor, position: Tensor) -> Tensor:
    """The routed route of the tokens at `position`, with a mask over every key up to the last of them.

    Args:
        query: (R, group, m, d).
        past: keys of the text from its first token on, and the pseudo-keys of its nb blocks.
        read: (R, m, nb), True at the blocks that are read exactly: own, sink and chosen ones.
        position: (m,) places in the text.
    """
    token = torch.arange(past.keys.shape[1], device=query.device)
    visible = read[..., token // past.block] & (token <= position[:, None])  # (R, m, s)
    number = torch.arange(read.shape[-1], device=query.device)
    earlier = number < position[:, None] // past.block  # (m, nb) complete blocks before the token's own
    return joint_softmax(query, past, ~visible, read | ~earlier)
