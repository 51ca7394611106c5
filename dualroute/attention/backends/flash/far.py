"""The far blocks: one pseudo-key for each, in the same softmax as what is read exactly.

In: queries of rows (a token and a head of its group), and the summaries of all blocks. Out: `fill_logits`
gives the logits of the far blocks, which `routed` puts beside the log-sum-exps of what is read exactly;
`backward` the gradients of queries and summaries.

All is float32 (float64 for float64). Rows are of one slab (see `slabs`): X = H_kv * documents, R = slots *
group, J blocks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dualroute.attention.backends.flash.slabs import Slab, fill_closed, first_of_documents
from dualroute.attention.core.far_summary import Summary
from dualroute.attention.core.layout import Stream
from dualroute.attention.core.precision import NEG_INF, accumulation_dtype


def summarise(key: Tensor, value: Tensor, stream: Stream, order: str) -> Summary | None:
    """Pseudo-keys (H_kv, nb, f) and values (H_kv, nb, d) of complete blocks; None for order "none".

    The logit of a block is features(q) . keys + log(block), with `query_features` below: what
    `core.far_summary` divides the query by is in the keys here, which are fewer.
    """
    block = stream.block
    if order == "none":
        return None
    wide, root = accumulation_dtype(key.dtype), math.sqrt(key.shape[-1])
    blocks, value_blocks = (rows.unflatten(1, (-1, block)) for rows in (key, value))
    values = value_blocks.mean(2, dtype=wide)
    if order == "first_order":
        return Summary(blocks.mean(2, dtype=wide) / root, values)
    scaled = blocks * stream.cached(("root", root, wide), lambda: key.new_full((1,), 1 / root, dtype=wide))
    half, mean = torch.var_mean(scaled, dim=2, correction=-block)  # divided by 2 * block
    return Summary(torch.cat([mean, half], dim=-1), values)


def summarise_backward(grad: Summary, key: Tensor, grad_key: Tensor, grad_value: Tensor, block: int) -> None:
    """Add the gradients of `summarise` to grad_key and grad_value (H_kv, S, d), in place."""
    dim, root = key.shape[-1], math.sqrt(key.shape[-1])
    blocks, to_key, to_value = (rows.unflatten(1, (-1, block)) for rows in (key, grad_key, grad_value))
    to_value.add_(grad.values[..., None, :], alpha=1 / block)
    to_key.add_(grad.keys[..., None, :dim], alpha=1 / (block * root))
    if grad.keys.shape[-1] > dim:  # d sigma^2 / d k = 2 (k - mu) / n
        mean = blocks.mean(2, keepdim=True, dtype=grad_key.dtype)
        to_key.addcmul_(blocks - mean, grad.keys[..., None, dim:], value=1 / (block * root * root))


def query_features(rows: Tensor, width: int) -> Tensor:
    """Queries (..., d) -> (..., width): q, and q^2 when width is 2d."""
    features = rows.new_empty(*rows.shape[:-1], width, dtype=accumulation_dtype(rows.dtype))
    first, *second = features.split(rows.shape[-1], dim=-1)
    first.copy_(rows)
    for part in second:
        torch.mul(first, first, out=part)
    return features


class Columns(NamedTuple):
    """Of a slab: features (X, R, f) of its rows, keys (X, J, f) and values (X, J, d) of its blocks, and the
    blocks (X, slots, C) that are read exactly, numbered like the columns."""

    features: Tensor
    keys: Tensor
    values: Tensor
    exact: Tensor


def columns(rows: Tensor, summary: Summary, exact: Tensor, stream: Stream, slab: Slab) -> Columns:
    """The columns of a slab; rows (H_kv, S, group, d), exact (H_kv, S, C) blocks of the stream."""
    features = query_features(slab.of_rows(rows).flatten(0, 1).flatten(1, 2), summary.keys.shape[-1])
    keys, values = (slab.of_columns(part) for part in summary)
    if len(stream.buckets) > 1:
        values = _finite(values)
    return Columns(features, keys, values, _column_numbers(exact, stream, slab))


def _column_numbers(exact: Tensor, stream: Stream, slab: Slab) -> Tensor:
    part = slab.of_rows(exact)  # (H_kv, documents, slots, C)
    if slab.documents > 1:
        part = part - first_of_documents(stream)
    elif slab.columns[0]:
        part = part - slab.columns[0]
    return part.flatten(0, 1)


def _finite(rows: Tensor) -> Tensor:
    """Rows of other documents have the weight 0 here, but 0 times a NaN of theirs is NaN."""
    return rows.nan_to_num(0.0, 0.0, 0.0)


def fill_logits(logits: Tensor, far: Columns, stream: Stream, slab: Slab) -> None:
    """Write the logits (X, R, J) of the far blocks, -inf where a block is not far."""
    bias = stream.cached(("log block", logits.dtype), lambda: _log_block(logits, stream.block))
    torch.baddbmm(bias.expand_as(logits), far.features, far.keys.transpose(1, 2), out=logits)
    fill_closed(logits, stream, slab, NEG_INF)
    by_slot = logits.unflatten(1, (far.exact.shape[1], -1))  # (X, slots, group, J)
    by_slot.scatter_(-1, far.exact[:, :, None].expand(-1, -1, by_slot.shape[2], -1), NEG_INF)


def _log_block(logits: Tensor, block: int) -> Tensor:
    return torch.full((1, 1, 1), math.log(block), dtype=logits.dtype, device=logits.device)


def backward(
    grad: Tensor, delta: Tensor, lse: Tensor, far: Columns, stream: Stream, slab: Slab
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries (X, R, d) and of the slab's summaries (X, J, f) and (X, J, d).

    grad (X, R, d); delta and lse (X, R, 1): the sums of grad * output, and the log-sum-exps, of the whole
    softmax.
    """
    several = len(stream.buckets) > 1
    weights = lse.new_empty(*far.features.shape[:2], slab.width)
    fill_logits(weights, far, stream, slab)
    weights.sub_(lse).exp_()
    features, keys = far.features, far.keys
    if several:  # rows that are NaN themselves
        fill_closed(weights, stream, slab, 0.0)
        grad, delta, features, keys = (_finite(part) for part in (grad, delta, features, keys))
    to_values = weights.transpose(1, 2) @ grad
    slopes = torch.baddbmm((-delta).expand_as(weights), grad, far.values.transpose(1, 2)).mul_(weights)
    to_keys = slopes.transpose(1, 2) @ features
    to_features = slopes @ keys
    dim = grad.shape[-1]
    to_query = to_features[..., :dim]
    if to_features.shape[-1] > dim:
        to_query = torch.addcmul(to_query, to_features[..., dim:], far.features[..., :dim], value=2)
    return to_query, to_keys, to_values
