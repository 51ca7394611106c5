"""The far summary: every past block a token does not read exactly, as one pseudo-key in the same softmax.

In: keys and values of a stream, and queries. Out: `summarise` gives the pseudo-keys and their values,
differentiable in keys and values, `summarise_backward` the gradients by hand; `far_query_features` what a
query multiplies them with.

A block of n keys (mean mu, diagonal variance sigma^2, mean value v_bar) enters with value v_bar and logit
    first order    log n + q . mu / sqrt(d)
    second order   log n + q . mu / sqrt(d) + 1/2 (q^2) . sigma^2 / d
the expansion of log sum_s exp(q . k_s / sqrt(d)) around mu: features(q) . [mu, sigma^2] + log n.

This is where the router learns. What is selected has no gradient, but an unselected
block's keys and values are pulled through their summary until the block deserves to be selected.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dualroute.attention.core.layout import Stream
from dualroute.attention.core.precision import accumulation_dtype
from dualroute.attention.core.router import key_moments, token_mean


class Summary(NamedTuple):
    """Per block of a stream: `keys` (H_kv, nb, f), f = d or 2d by the order; `values` (H_kv, nb, d)."""

    keys: Tensor
    values: Tensor


def summarise(key: Tensor, value: Tensor, stream: Stream, order: str, causal: bool = True) -> Summary | None:
    """Block statistics of keys and values (H_kv, S, d), with gradients; None for order "none".

    In `accumulation_dtype`, whatever the keys are.
    """
    if order == "none":
        return None
    valid = _valid(stream, causal)
    blocks, value_blocks = (rows.unflatten(1, (-1, stream.block)) for rows in (key, value))
    return Summary(far_keys(blocks, order, valid), token_mean(value_blocks, valid))


def summarise_backward(
    grad: Summary,
    summary: Summary,
    key: Tensor,
    stream: Stream,
    causal: bool,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Add the gradients of `summarise` to grad_key and grad_value (H_kv, S, d) in place, without a copy of
    the keys: d mu = 1 / n and d sigma^2 = 2 (k - mu) / n for each of the n keys of a block."""
    valid = _valid(stream, causal)
    dim = key.shape[-1]
    tokens = stream.block if valid is None else valid.sum(-1)[:, None]  # per block
    weight = 1 if valid is None else valid[..., None]  # (nb, block, 1)
    blocks, to_key, to_value = (rows.unflatten(1, (-1, stream.block)) for rows in (key, grad_key, grad_value))
    shift = grad.keys[..., :dim] / tokens  # (H_kv, nb, d)
    if grad.keys.shape[-1] > dim:
        slope = 2 * grad.keys[..., dim:] / tokens
        to_key.addcmul_(blocks, slope[..., None, :])  # keys of slots without a token are 0
        shift = shift - slope * summary.keys[..., :dim]
    to_key.add_(shift[..., None, :] * weight)
    to_value.add_((grad.values / tokens)[..., None, :] * weight)


def _valid(stream: Stream, causal: bool) -> Tensor | None:
    """(nb, block) slots that count; None = all. Causal: an incomplete block is never anybody's past."""
    return None if causal or stream.slot_valid is None else stream.slot_valid.view(-1, stream.block)


def far_keys(blocks: Tensor, order: str, valid: Tensor | None = None) -> Tensor:
    """Keys in blocks (..., nb, block, d) -> pseudo-keys (..., nb, f): [mu], second order [mu, sigma^2]."""
    if order == "first_order":
        return token_mean(blocks, valid)
    return torch.cat(key_moments(blocks, valid), dim=-1)


def far_query_features(query: Tensor, width: int) -> Tensor:
    """Queries (..., d) -> features (..., width): q / sqrt(d), and (q / sqrt(d))^2 / 2 when width is 2d."""
    scaled = query.to(accumulation_dtype(query.dtype)) / math.sqrt(query.shape[-1])
    return scaled if width == query.shape[-1] else torch.cat([scaled, scaled.square() / 2], dim=-1)
