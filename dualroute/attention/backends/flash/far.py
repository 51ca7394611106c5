"""The far blocks: one pseudo-key for each, in the same softmax as what is read exactly.

In: queries (H_kv, S, group, d), the summaries of all blocks, and the log-sum-exps of what is read exactly.
Out: `forward` gives the softmax of both together and the sum over the far blocks; `backward` the gradients of
queries and summaries.

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
from dualroute.attention.core.far_summary import Summary
from dualroute.attention.core.layout import Stream
from dualroute.attention.core.precision import NEG_INF, accumulation_dtype

EVEN = 4  # columns: each row of a matrix begins where a product can load several numbers at once


def has_holes(stream: Stream, causal: bool) -> bool:
    """Whether blocks that are read may have slots without a token: causal, they are never anybody's past."""
    return not causal and stream.slot_valid is not None


def summarise(key: Tensor, value: Tensor, stream: Stream, order: str, causal: bool) -> Summary | None:
    """Pseudo-keys (H_kv, nb, f) and values (H_kv, nb, d), as `core.far_summary`; None for order "none"."""
    if order == "none":
        return None
    wide, dim = accumulation_dtype(key.dtype), key.shape[-1]
    blocks, value_blocks = (rows.unflatten(1, (-1, stream.block)) for rows in (key, value))
    means = 1 if order == "first_order" else 2
    statistics = key.new_empty(*blocks.shape[:2], (means + 1) * dim, dtype=wide)
    values, mean, *variance = statistics.split(dim, dim=-1)
    torch.mean(value_blocks, 2, dtype=wide, out=values)
    torch.mean(blocks, 2, dtype=wide, out=mean)
    for part in variance:
        torch.var(blocks, 2, correction=0, out=part)
    if has_holes(stream, causal):
        # the zeros of slots without a token are among them: with a share r of tokens, and mu theirs,
        # mean = r mu and variance = r sigma^2 + r (1 - r) mu^2
        full, missing = stream.cached(("share of tokens", wide), lambda: _share_of_tokens(stream, wide))
        statistics.mul_(full)
        for part in variance:
            part.addcmul_(mean * missing, mean, value=-1)
    return Summary(statistics[..., dim:], values)


def _share_of_tokens(stream: Stream, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(nb, 1) each: 1 / the share of slots with a token, and the share of those without."""
    share = stream.tokens_in_block().to(dtype)[:, None] / stream.block
    return 1 / share, 1 - share


def _token_weights(stream: Stream, dtype: torch.dtype) -> Tensor:
    """(nb, block, 1) 1 / the tokens of the block, 0 in slots without a token."""
    valid = stream.slot_valid
    assert valid is not None
    return (valid.view(-1, stream.block).to(dtype) / stream.tokens_in_block()[:, None])[..., None]


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
    block, dim, wide = stream.block, key.shape[-1], grad_key.dtype
    blocks, to_key, to_value = (rows.unflatten(1, (-1, block)) for rows in (key, grad_key, grad_value))
    to_mean, *to_variance = grad.keys[..., None, :].split(dim, dim=-1)
    weights = None
    if has_holes(stream, causal):
        weights = stream.cached(("token weights", wide), lambda: _token_weights(stream, wide))
        to_value.addcmul_(grad.values[..., None, :], weights)
        to_key.addcmul_(to_mean, weights)
    else:
        to_value.add_(grad.values[..., None, :], alpha=1 / block)
        to_key.add_(to_mean, alpha=1 / block)
    for part in to_variance:  # d sigma^2 / d k = 2 (k - mu) / n
        shift = blocks - summary.keys[..., None, :dim]
        if weights is not None:
            shift.mul_(weights)
        to_key.addcmul_(shift, part, value=2 if weights is not None else 2 / block)


def query_features(rows: Tensor, width: int, stream: Stream) -> Tensor:
    """`core.far_summary.far_query_features` of queries (..., d), (..., width), in two launches."""
    dim, wide = rows.shape[-1], accumulation_dtype(rows.dtype)
    zero = stream.cached(("number", 0.0, wide), lambda: rows.new_zeros(1, dtype=wide))
    factor = stream.cached(("root", dim, wide), lambda: rows.new_full((1,), 1 / math.sqrt(dim), dtype=wide))
    features = rows.new_empty(*rows.shape[:-1], width, dtype=wide)
    scaled, *half_square = features.split(dim, dim=-1)
    torch.mul(rows, factor, out=scaled)
    for part in half_square:
        torch.addcmul(zero, scaled, scaled, value=0.5, out=part)
    return features


def _finite(rows: Tensor, stream: Stream) -> Tensor:
    """Rows of other documents have the weight 0 here, but 0 times a NaN of theirs is NaN."""
    return rows.nan_to_num(0.0, 0.0, 0.0) if len(stream.buckets) > 1 else rows


class _Logits:
    """The slabs of one pass, and the logits of each."""

    def __init__(self, stream: Stream, features: Tensor, exact: Tensor, causal: bool) -> None:
        """features (H_kv, S, group, f); exact (H_kv, S, C) int64 blocks of the stream, read exactly."""
        self.stream, self.features, self.causal = stream, features, causal
        self.holes = has_holes(stream, causal)
        self.slabs = slabs(stream, features.shape[0] * features.shape[2], causal)
        first = first_columns(stream, self.slabs)
        self.exact = exact if first is None else exact - first

    def __iter__(self) -> Iterator[Slab]:
        return iter(self.slabs)

    def of_rows(self, rows: Tensor, slab: Slab) -> Tensor:
        """(H_kv, S, group, n) contiguous -> (X, R, n), a view."""
        return slab.of_rows(rows).flatten(1, 2)

    def memory(self, extra: int = 0) -> Tensor:
        """For a matrix of any of the slabs, with at most `extra` columns more."""
        rows = self.features.shape[0] * self.features.shape[2] * self.stream.block * self.slabs[0].documents
        largest = max((part.rows[1] - part.rows[0]) * (part.width + extra) for part in self.slabs)
        return self.features.new_empty(rows * largest)

    def shaped(self, memory: Tensor, slab: Slab, extra: int = 0) -> Tensor:
        """(X, R, J + extra) of the memory."""
        rows, width = self.of_rows(self.features, slab).shape, slab.width + extra
        return memory[: rows[0] * rows[1] * width].view(*rows[:2], width)

    def fill(self, logits: Tensor, slab: Slab, keys: Tensor, less: Tensor | None = None) -> None:
        """Write the logits (X, R, J) of the far blocks, -inf where a block is none; keys (X, J, f).

        `less` (X, R, 1) of `taken_off` is taken off the logits of each row.
        """
        rows, columns = self.of_rows(self.features, slab), keys.transpose(1, 2)
        if less is None or self.holes:
            bias = self._log_tokens(logits, slab)
            torch.baddbmm(bias.expand_as(logits), rows, columns, out=logits)
        else:
            torch.baddbmm(less.expand_as(logits), rows, columns, beta=-1, out=logits)
        if less is not None and self.holes:
            logits.sub_(less)
        fill_closed(logits, self.stream, slab, self.causal, NEG_INF)
        exact = slab.of_rows(self.exact)
        by_slot = logits.unflatten(1, (exact.shape[1], -1))  # (X, slots, group, J)
        by_slot.scatter_(-1, exact[:, :, None].expand(-1, -1, by_slot.shape[2], -1), NEG_INF)

    def taken_off(self, lse: Tensor) -> Tensor:
        """(H_kv, S, group) of each row -> (H_kv, S, group, 1) for `fill`, with the size of a full block."""
        return lse[..., None] if self.holes else lse[..., None] - math.log(self.stream.block)

    def _log_tokens(self, logits: Tensor, slab: Slab) -> Tensor:
        """The logarithm of how many tokens each block has, which broadcasts to logits (X, R, J)."""

        def compute() -> Tensor:
            if not self.holes:
                return logits.new_full((1, 1, 1), math.log(self.stream.block))
            tokens = self.stream.tokens_in_block().to(logits.dtype).log()
            return slab.of_columns(tokens.expand(kv_heads, -1).contiguous())[:, None]

        kv_heads = len(self.features)
        key = ("log tokens", slab, kv_heads, logits.dtype) if self.holes else ("log block", logits.dtype)
        return self.stream.cached(key, compute)


class Joint(NamedTuple):
    """One softmax over what is read exactly and the far blocks: its log-sum-exp (H_kv, S, group), the weights
    of what is read exactly (H_kv, S, group, C) and the sum over the far blocks (H_kv, S, group, d)."""

    lse: Tensor
    weights: Tensor
    far: Tensor


def forward(
    query: Tensor, lses: list[Tensor], summary: Summary, exact: Tensor, stream: Stream, causal: bool
) -> Joint:
    """The joint softmax of queries (H_kv, S, group, d).

    lses: log-sum-exps of what is read exactly, each (H_kv, S, group, some), C together, -inf = nothing, the
    first one finite. exact (H_kv, S, some): blocks that are therefore not far.
    """
    keys, values = summary.keys, _finite(summary.values, stream)
    features = query_features(query, keys.shape[-1], stream)
    logits = _Logits(stream, features, exact, causal)
    count = sum(part.shape[-1] for part in lses)
    memories = [logits.memory(count + EVEN - 1) for _ in range(2)]
    nothing = stream.cached(("number", NEG_INF, features.dtype), lambda: features.new_full((1,), NEG_INF))
    lse = features.new_empty(*query.shape[:-1], 1)
    weights, far = (features.new_empty(*query.shape[:-1], width) for width in (count, query.shape[-1]))
    for slab in logits:
        extra = count + -(slab.width + count) % EVEN
        of_slab, shares = (logits.shaped(memory, slab, extra) for memory in memories)
        parts = [slab.of_rows(part) for part in lses]
        if extra > count:
            parts.append(nothing.expand(*parts[0].shape[:-1], extra - count))
        by_slot = parts[0].shape[1:3]
        torch.cat(parts, dim=-1, out=of_slab[..., slab.width :].unflatten(1, by_slot))
        logits.fill(of_slab[..., : slab.width], slab, slab.of_columns(keys))
        torch.log_softmax(of_slab, -1, out=shares)
        of_far, of_exact = shares[..., : slab.width], shares[..., slab.width : slab.width + count]
        torch.sub(parts[0], of_exact[..., :1].unflatten(1, by_slot), out=slab.of_rows(lse))
        torch.exp(of_exact, out=logits.of_rows(weights, slab))
        torch.bmm(of_far.exp_(), slab.of_columns(values), out=logits.of_rows(far, slab))
    return Joint(lse[..., 0], weights, far)


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
    features = _finite(query_features(query, keys.shape[-1], stream), stream)
    wide_grad = grad.to(lse.dtype)
    delta = _finite((wide_grad * out).sum(-1, keepdim=True), stream)
    wide_grad = _finite(wide_grad, stream)
    logits = _Logits(stream, features, exact, causal)
    less = logits.taken_off(lse)
    memories = [logits.memory() for _ in range(2)]
    to_keys, to_values = torch.zeros_like(keys), torch.zeros_like(values)
    to_features = torch.empty_like(features)
    for slab in logits:
        rows, of_features, of_delta, of_less = (
            logits.of_rows(part, slab) for part in (wide_grad, features, delta, less)
        )
        weights, slopes = (logits.shaped(memory, slab) for memory in memories)
        logits.fill(weights, slab, slab.of_columns(keys), of_less)
        weights.exp_()
        slab.of_columns(to_values).baddbmm_(weights.transpose(1, 2), rows)
        columns = slab.of_columns(values).transpose(1, 2)
        torch.baddbmm(of_delta.expand_as(slopes), rows, columns, beta=-1, out=slopes).mul_(weights)
        slab.of_columns(to_keys).baddbmm_(slopes.transpose(1, 2), of_features)
        torch.bmm(slopes, slab.of_columns(keys), out=logits.of_rows(to_features, slab))
    # d (q / sqrt(d)) and d (q / sqrt(d))^2 / 2
    to_query.add_(to_features[..., :dim], alpha=1 / math.sqrt(dim))
    if to_features.shape[-1] > dim:
        to_query.addcmul_(to_features[..., dim:], features[..., :dim], value=1 / math.sqrt(dim))
    return Summary(to_keys, to_values)
