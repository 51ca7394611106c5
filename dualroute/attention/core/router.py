"""The router: the score of a block for a query, and the best blocks. Chosen per token, never for several.

In: queries, and keys in blocks. Out: `block_features` and `query_features`, whose product is the score;
`block_scores`, and `top_blocks`, the best of them. Every back end's `select_blocks` is made of these or
computes the same. Query heads that share keys share a choice: their scores are summed.

With k over the keys of a block, mu and sigma^2 their mean and diagonal variance, the scores are
    mean     q . mu                                                (MoBA, NSA: arXiv 2502.13189, 2502.11089)
    moment   q . mu / sqrt(d) + 1/2 (q^2) . sigma^2 / d            log sum exp(q . k / sqrt(d)), 2nd order
    minmax   max over sub-blocks, sum_i max(q_i min k_i, q_i max k_i)  bounds q . k (Quest: 2406.10774)
Each is one GEMM of query features and block features; for minmax, max(q m, q M) = q^- m + q^+ M.

Nothing about the query may be pooled. A block of queries that chose together would let
later tokens decide what earlier ones read, and a causal model would see the future. (And: bounds and
variances read single coordinates, which the rotary embedding turns; only the mean router is blind to a shift
of all positions.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dualroute.attention.core.precision import accumulation_dtype


def query_features(query: Tensor, router: str) -> Tensor:
    """Queries (H_kv, group, ..., d) -> features (H_kv, ..., f), summed over the heads that share keys.

    Every score is linear in these features, so the sum of features gives the sum of scores.
    """
    if router == "mean":
        return _sum_heads(query)
    if router == "moment":
        scaled = query / math.sqrt(query.shape[-1])
        return torch.cat([_sum_heads(scaled), _sum_heads(scaled.square()) / 2], dim=-1)
    return torch.cat([_sum_heads(query.clamp_min(0)), _sum_heads(query.clamp_max(0))], dim=-1)


def _sum_heads(rows: Tensor) -> Tensor:
    """(H_kv, group, ...) -> (H_kv, ...), without a copy where a group is one head."""
    return rows.sum(1) if rows.shape[1] > 1 else rows[:, 0]


def block_features(blocks: Tensor, router: str, sub_block: int, valid: Tensor | None = None) -> Tensor:
    """Keys in blocks (..., nb, block, d) -> features (..., nb, parts, f).

    There are block / sub_block parts for minmax, else one. `valid` (nb, block) marks the slots that hold a
    token, the first of each block always does; None = all. Bounds are of the keys' type, moments see below.
    """
    if router == "minmax":
        parts = blocks.unflatten(-2, (-1, sub_block))  # (..., nb, parts, sub_block, d)
        if valid is not None:
            # a real key where there is none, so that no bound changes: the part's first one, or in a part
            # without any the block's, whose point lies within the bounds of the first part
            there = valid.unflatten(-1, (-1, sub_block))[..., None]
            first = torch.where(there[..., :1, :], parts[..., :1, :], parts[..., :1, :1, :])
            parts = torch.where(there, parts, first)
        return torch.cat([parts.amax(-2), parts.amin(-2)], dim=-1)
    mean, variance = key_moments(blocks, valid)
    features = mean if router == "mean" else torch.cat([mean, variance], dim=-1)
    return features[..., None, :]


def token_mean(blocks: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean (..., nb, d) over the tokens of each block (..., nb, block, d), in `accumulation_dtype`."""
    blocks = blocks.to(accumulation_dtype(blocks.dtype))
    if valid is None:
        return blocks.mean(-2)
    weight = valid.to(blocks.dtype)[..., None]  # (nb, block, 1)
    return (blocks * weight).sum(-2) / weight.sum(-2)


def key_moments(blocks: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and diagonal variance, (..., nb, d), of the keys (..., nb, block, d) of each block.

    In `accumulation_dtype`: in float16 the square of 300 is infinite already, and in bfloat16 blocks would be
    told apart by how their means are rounded.
    """
    blocks = blocks.to(accumulation_dtype(blocks.dtype))
    mean = token_mean(blocks, valid)
    return mean, token_mean((blocks - mean[..., None, :]).square(), valid)


@torch.no_grad()
def block_scores(query: Tensor, features: Tensor, router: str) -> Tensor:
    """Scores (H_kv, ..., rows, J): queries (H_kv, group, ..., rows, d), features (H_kv, ..., J, parts, f).

    A block's score is that of its best part. Always float32 or float64: half-precision scores would tie, and
    the blocks chosen among ties say nothing about the keys.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = query_features(query.to(wide), router)
    if rows.shape[-2] == 1:  # a step of decoding: features are read where they lie, not copied
        scores = rows @ features.to(wide).flatten(-3, -2).transpose(-1, -2)  # (H_kv, ..., 1, J * parts)
        return scores.unflatten(-1, features.shape[-3:-1]).amax(-1)
    columns = (
        features.to(wide).transpose(-3, -2).flatten(-3, -2)
    )  # (H_kv, ..., parts * J, f): parts far apart
    scores = rows @ columns.transpose(-1, -2)
    best, *others = scores.split(features.shape[-3], dim=-1)
    for part in others:
        torch.maximum(best, part, out=best)
    return best


def top_blocks(scores: Tensor, allowed: Tensor, top_k: int) -> Tensor:
    """Columns of the min(top_k, J) best allowed scores (..., J), in no order, -1 where too few are allowed.
    Overwrites `scores`.

    Scores are compared as float32, and of equal ones the first column wins. That depends neither on how many
    columns there are nor on how a sort happens to meet them, so ties cannot make a prefix, or a cached step,
    differ from the whole.
    """
    scores = scores.to(torch.float32).masked_fill_(~allowed, -math.inf)
    columns = scores.shape[-1]
    if top_k == 0 or columns == 0:
        return torch.empty(*scores.shape[:-1], 0, dtype=torch.long, device=scores.device)
    best, chosen = _top(scores, min(top_k + 1, columns))
    if columns > top_k:
        tied = (best[..., -2] == best[..., -1]) & (best[..., -1] > -math.inf)
        best, chosen = best[..., :-1], chosen[..., :-1]
        if bool(tied.any()):  # topk takes any of them; a stable sort takes the first
            order = torch.sort(scores[tied], dim=-1, descending=True, stable=True)
            best, chosen = best.clone(), chosen.clone()
            best[tied], chosen[tied] = order.values[:, :top_k], order.indices[:, :top_k]
    return chosen.masked_fill(best == -math.inf, -1)


def _top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`topk` of the last dimension, as quick as it can be on a CPU: with 64 * count columns and more it keeps
    a heap, with fewer it moves whole rows about, which takes two to three times as long."""
    missing = 64 * count - scores.shape[-1]
    if scores.device.type == "cpu" and 0 < missing < scores.shape[-1] * 2:
        scores = torch.nn.functional.pad(scores, (0, missing), value=-math.inf)
    return scores.topk(count, dim=-1)
