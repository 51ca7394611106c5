"""The far blocks: one pseudo-key for each, in the same softmax as what is read exactly.

In: queries (H_kv, S, group, d), and the summaries of all blocks. Out: `forward` gives each row (a token and a
head of its group) the sums of a softmax over its far blocks alone, which `routed` merges with what is read
exactly; `backward` the gradients of queries and summaries.

All is float32 (float64 for float64). The logits of all far blocks are a matrix of rows by blocks, made slab
by slab (see `slabs`) in the same memory; for a slab, rows are (X, R, ...) with X = H_kv * documents and R =
slots * group, and there are J blocks. Everything else is made once, for all slabs together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dualroute.attention.backends.flash.slabs import Slab, fill_closed, first_columns, slabs
from dualroute.attention.core import far_summary
from dualroute.attention.core.far_summary import Summary
from dualroute.attention.core.layout import Stream
from dualroute.attention.core.precision import accumulation_dtype

NOT_FAR = -1e30  # logit of a block that is not far: finite, so that a row without any far one has a maximum
ONES = 4  # columns beside the values, the first of them 1: their product with weights is the sum of weights


def has_holes(stream: Stream, causal: bool) -> bool:
    """Whether blocks that are read may have slots without a token: causal, they are never anybody's past."""
    return not causal and stream.slot_valid is not None


def summarise(key: Tensor, value: Tensor, stream: Stream, order: str, causal: bool) -> Summary | None:
    """Pseudo-keys (H_kv, nb, f) and values (H_kv, nb, d + ONES) of blocks; None for order "none".

    The logit of a block is features(q) . keys + log(its tokens), with `query_features` below: what
    `core.far_summary` divides the query by is in the keys here, which are fewer.
    """
    if order == "none":
        return None
    block, dim = stream.block, key.shape[-1]
    wide, root = accumulation_dtype(key.dtype), math.sqrt(dim)
    values = value.new_empty(len(value), stream.num_blocks, dim + ONES, dtype=wide)
    values[..., dim:] = stream.cached(("ones", wide), lambda: _one_and_zeros(values))
    if has_holes(stream, causal):
        plain = far_summary.summarise(key, value, stream, order, causal)
        assert plain is not None
        values[..., :dim] = plain.values
        return Summary(plain.keys * _divisors(plain.keys, dim, stream), values)
    blocks, value_blocks = (rows.unflatten(1, (-1, block)) for rows in (key, value))
    torch.mean(value_blocks, 2, dtype=wide, out=values[..., :dim])
    if order == "first_order":
        return Summary(blocks.mean(2, dtype=wide) / root, values)
    scaled = blocks * stream.cached(("root", root, wide), lambda: key.new_full((1,), 1 / root, dtype=wide))
    half, mean = torch.var_mean(scaled, dim=2, correction=-block)  # divided by 2 * block
    return Summary(torch.cat([mean, half], dim=-1), values)


def _one_and_zeros(values: Tensor) -> Tensor:
    ones = values.new_zeros(ONES)
    ones[0] = 1
    return ones


def _divisors(keys: Tensor, dim: int, stream: Stream) -> Tensor:
    """(f,) what pseudo-keys (H_kv, nb, f) are multiplied with."""

    def compute() -> Tensor:
        first = keys.new_full((dim,), 1 / math.sqrt(dim))
        return torch.cat([first, keys.new_full((keys.shape[-1] - dim,), 1 / (2 * dim))])

    return stream.cached(("divisors", dim, keys.shape[-1], keys.dtype), compute)


def summarise_backward(
    grad: Summary,
    summary: Summary,
    key: Tensor,
    stream: Stream,
    causal: bool,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Add the gradients of `summarise` to grad_key and grad_value (H_kv, S, d), in place."""
    block, dim, root = stream.block, key.shape[-1], math.sqrt(key.shape[-1])
    if has_holes(stream, causal):
        divisors = _divisors(summary.keys, dim, stream)
        plain = Summary(summary.keys / divisors, summary.values)
        grad = Summary(grad.keys * divisors, grad.values)
        far_summary.summarise_backward(grad, plain, key, stream, causal, grad_key, grad_value)
        return
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


def _finite(rows: Tensor, stream: Stream) -> Tensor:
    """Rows of other documents have the weight 0 here, but 0 times a NaN of theirs is NaN."""
    return rows.nan_to_num(0.0, 0.0, 0.0) if len(stream.buckets) > 1 else rows


class _Logits:
    """The slabs of one pass, and the memory in which each has its matrices (X, R, J)."""

    def __init__(self, stream: Stream, features: Tensor, exact: Tensor, causal: bool) -> None:
        """features (H_kv, S, group, f); exact (H_kv, S, C) int64 blocks of the stream, read exactly."""
        kv_heads, _, group, _ = features.shape
        self.stream, self.features, self.causal = stream, features, causal
        self.slabs = slabs(stream, kv_heads * group, causal)
        first = first_columns(stream, self.slabs)
        self.exact = exact if first is None else exact - first
        self._rows = kv_heads * group * stream.block * self.slabs[0].documents
        self._most = max((part.rows[1] - part.rows[0]) * part.width for part in self.slabs)

    def memory(self) -> Tensor:
        """For one matrix, of any of the slabs."""
        return self.features.new_empty(self._rows * self._most)

    def shaped(self, memory: Tensor, slab: Slab) -> Tensor:
        """(X, R, J) of the memory."""
        rows = self.of_rows(self.features, slab).shape
        return memory[: rows[0] * rows[1] * slab.width].view(*rows[:2], slab.width)

    def of_rows(self, rows: Tensor, slab: Slab) -> Tensor:
        """(H_kv, S, group, n) contiguous -> (X, R, n), a view."""
        return slab.of_rows(rows).flatten(1, 2)

    def fill(self, memory: Tensor, slab: Slab, keys: Tensor, less: Tensor | None = None) -> Tensor:
        """The logits (X, R, J) of the far blocks, NOT_FAR where a block is none; keys (X, J, f).

        `less` (X, R, 1) = logarithm of a full block - what is taken off the logits of each row.
        """
        logits = self.shaped(memory, slab)
        holes = has_holes(self.stream, self.causal)
        bias = _log_tokens(self.stream, slab, len(self.features), logits, holes)
        rows = self.of_rows(self.features, slab)
        torch.baddbmm(
            (bias if less is None or holes else less).expand_as(logits),
            rows,
            keys.transpose(1, 2),
            out=logits,
        )
        if holes and less is not None:
            logits.add_(less - math.log(self.stream.block))
        fill_closed(logits, self.stream, slab, self.causal, NOT_FAR)
        exact = slab.of_rows(self.exact)
        by_slot = logits.unflatten(1, (exact.shape[1], -1))  # (X, slots, group, J)
        by_slot.scatter_(-1, exact[:, :, None].expand(-1, -1, by_slot.shape[2], -1), NOT_FAR)
        return logits

    def __iter__(self) -> Iterator[Slab]:
        return iter(self.slabs)


def _log_tokens(stream: Stream, slab: Slab, kv_heads: int, logits: Tensor, holes: bool) -> Tensor:
    """What broadcasts to logits (X, R, J): the logarithm of how many tokens each block has."""

    def compute() -> Tensor:
        if not holes:
            return logits.new_full((1, 1, 1), math.log(stream.block))
        tokens = stream.tokens_in_block().to(logits.dtype).log()
        return slab.of_columns(tokens.expand(kv_heads, -1).contiguous())[:, None]

    key = ("log tokens", slab, kv_heads, logits.dtype) if holes else ("log block", logits.dtype)
    return stream.cached(key, compute)


class Sums(NamedTuple):
    """Of each row, over its far blocks j: `top` (H_kv, S, group, 1) >= all logits, and the sum of
    exp(logit_j - top) * values_j (H_kv, S, group, d + ONES), column d of which is the sum of weights."""

    top: Tensor
    weighted: Tensor


def forward(query: Tensor, summary: Summary, exact: Tensor, stream: Stream, causal: bool) -> Sums:
    """The far blocks of queries (H_kv, S, group, d); exact (H_kv, S, C) blocks are read exactly instead.

    A row without any far block gets the top NOT_FAR: its sums have no weight beside anything else.
    """
    keys, values = summary
    values = _finite(values, stream)
    logits = _Logits(stream, query_features(query, keys.shape[-1]), exact, causal)
    memory = logits.memory()
    weighted = memory.new_empty(*query.shape[:-1], values.shape[-1])
    top = memory.new_empty(*query.shape[:-1], 1)
    for slab in logits:
        weights = logits.fill(memory, slab, slab.of_columns(keys))
        of_slab = logits.of_rows(top, slab)
        torch.amax(weights, -1, keepdim=True, out=of_slab)
        weights.sub_(of_slab).exp_()
        torch.bmm(weights, slab.of_columns(values), out=logits.of_rows(weighted, slab))
    return Sums(top, weighted)


def backward(
    grad: Tensor,
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    summary: Summary,
    exact: Tensor,
    stream: Stream,
    causal: bool,
    to_query: Tensor,
) -> Summary:
    """Gradients of the summary (H_kv, nb, f) and (H_kv, nb, d); those of the queries are added to to_query.

    query, grad, out and to_query (H_kv, S, group, d); lse (H_kv, S, group). Output and log-sum-exp are of the
    whole softmax, and grad is the output's.
    """
    dim = query.shape[-1]
    keys, values = (_finite(part, stream) for part in summary)
    values = values[..., :dim]
    features = _finite(query_features(query, keys.shape[-1]), stream)
    wide_grad = grad.to(lse.dtype)
    less_delta = _finite((wide_grad * out).sum(-1, keepdim=True).neg_(), stream)  # - grad . out
    wide_grad = _finite(wide_grad, stream)
    logits = _Logits(stream, features, exact, causal)
    less = math.log(stream.block) - lse[..., None]
    memories = logits.memory(), logits.memory()
    to_keys, to_values = torch.zeros_like(keys), values.new_zeros(values.shape)
    to_features = torch.empty_like(features)
    for slab in logits:
        rows, *of_rows = (logits.of_rows(part, slab) for part in (wide_grad, less_delta, features, less))
        weights = logits.fill(memories[0], slab, slab.of_columns(keys), of_rows[2]).exp_()
        slab.of_columns(to_values).baddbmm_(weights.transpose(1, 2), rows)
        slopes = logits.shaped(memories[1], slab)
        values_of_slab = slab.of_columns(values).transpose(1, 2)
        torch.baddbmm(of_rows[0].expand_as(slopes), rows, values_of_slab, out=slopes).mul_(weights)
        slab.of_columns(to_keys).baddbmm_(slopes.transpose(1, 2), of_rows[1])
        torch.bmm(slopes, slab.of_columns(keys), out=logits.of_rows(to_features, slab))
    to_query.add_(to_features[..., :dim])
    if to_features.shape[-1] > dim:
        to_query.addcmul_(to_features[..., dim:], features[..., :dim], value=2)
    return Summary(to_keys, to_values)
