"""The far blocks: what a token does not read exactly, added to its softmax as one pseudo-key for each block.

In: queries (H_kv, S, group, d), the `Summary` of the blocks and the selected ones. Out: `merge_far` adds the
pseudo-keys to a running (output, log-sum-exp); `far_backward` gives their gradients. The formulas are in
`core.far_summary`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dualroute.attention.backends.torch.device import at_once, least_ranges
from dualroute.attention.core.far_summary import Summary, far_query_features
from dualroute.attention.core.layout import Bucket, Stream, query_chunks
from dualroute.attention.core.precision import NEG_INF

MAX_LOGITS = 1 << 22  # logits held at once: bounds the memory of the far summary


class _Chunk(NamedTuple):
    """Query blocks of one bucket with the summaries they may read: all but the document's first block."""

    rows: tuple[int, int]  # first and last + 1 slot of each document
    bucket: Bucket
    columns: slice  # blocks inside the document
    bias: Tensor  # (documents, 1, columns) log of the tokens in each block
    closed: Tensor  # (H_kv, documents, rows, columns) True: own block, future block or read exactly


def _far_chunks(
    stream: Stream, selected: Tensor, query_heads: int, causal: bool, dtype: torch.dtype
) -> Iterator[_Chunk]:
    kv_heads, _, chosen = selected.shape
    block, device = stream.block, selected.device
    log_tokens = stream.tokens_in_block().to(dtype).log()
    for bucket in stream.buckets:
        first, documents, blocks = bucket
        part = slice(first * block, (first + documents * blocks) * block)
        chosen_here = selected[:, part, 1:].unflatten(1, (documents, blocks * block))
        base = first + blocks * torch.arange(documents, device=device).view(-1, 1, 1)
        bias = log_tokens[first : first + documents * blocks].view(documents, 1, blocks)
        cost = query_heads * documents * block * blocks
        for begin, end in query_chunks(blocks, cost, at_once(MAX_LOGITS, device), least_ranges(device)):
            columns = slice(1, end - 1 if causal else blocks)
            count = columns.stop - 1
            if count < chosen:
                continue  # every candidate was selected, besides the sink: nothing is far
            rows = (begin * block, end * block)
            own = torch.arange(begin, end, device=device).repeat_interleave(block)[:, None]
            number = torch.arange(1, columns.stop, device=device)
            closed = number >= own if causal else number == own  # (rows, count)
            if stream.copies:
                closed |= stream.hides(bucket, own, number)
            # One more column takes the "-1 = none" entries.
            closed = torch.nn.functional.pad(closed, (0, 1)).repeat(kv_heads, documents, 1, 1)
            picked = chosen_here[:, :, rows[0] : rows[1]].long()
            picked = torch.where(picked < 0, count, picked - base - 1)
            closed.scatter_(-1, picked, True)
            yield _Chunk(rows, bucket, columns, bias[..., columns], closed[..., :count])


def _documents(rows: Tensor, bucket: Bucket, size: int) -> Tensor:
    """(H, X, ...) -> (H, documents, size, ...) view of one bucket, `size` entries of X per document."""
    begin = bucket.first_block * size // bucket.blocks
    return rows[:, begin : begin + bucket.documents * size].unflatten(1, (bucket.documents, size))


def _far_logits(features: Tensor, keys: Tensor, chunk: _Chunk) -> Tensor:
    """(H_kv, documents, rows * group, columns) from features (H_kv, documents, rows * group, f)."""
    logits = (features @ keys.transpose(-1, -2)).add_(chunk.bias)
    rows = chunk.closed.shape[2]
    logits.unflatten(2, (rows, -1)).masked_fill_(chunk.closed[:, :, :, None], NEG_INF)
    return logits


def merge_far(
    query: Tensor, summary: Summary, selected: Tensor, stream: Stream, causal: bool, out: Tensor, lse: Tensor
) -> None:
    """Add the far blocks, in place, to out (H_kv, S, group, d) and lse (H_kv, S, group) of the exact ones.

    query is (H_kv, S, group, d); selected is what `select_blocks` gave.
    """
    kv_heads, _, group, _ = query.shape
    keys, values = (part.to(out.dtype) for part in summary)
    for chunk in _far_chunks(stream, selected, kv_heads * group, causal, out.dtype):
        bucket, (begin, end) = chunk.bucket, chunk.rows
        length = bucket.blocks * stream.block
        rows = _documents(query, bucket, length)[:, :, begin:end].flatten(2, 3)
        logits = _far_logits(
            far_query_features(rows, keys.shape[-1]),
            _documents(keys, bucket, bucket.blocks)[:, :, chunk.columns],
            chunk,
        )
        peak = logits.amax(-1, keepdim=True).clamp_min(
            torch.finfo(logits.dtype).min
        )  # finite where all are closed
        weights = logits.sub_(peak).exp_()
        far_lse = (peak + weights.sum(-1, keepdim=True).log()).unflatten(2, (end - begin, group))
        far_sum = weights @ _documents(values, bucket, bucket.blocks)[:, :, chunk.columns]

        part_out = _documents(out, bucket, length)[:, :, begin:end]  # (H_kv, documents, rows, group, d)
        part_lse = _documents(lse, bucket, length)[:, :, begin:end]
        old = part_lse[..., None]
        merged = torch.logaddexp(old, far_lse)
        part_out.mul_((old - merged).exp())
        part_out.add_(
            far_sum.unflatten(2, (end - begin, group)).mul_(
                (peak.unflatten(2, (end - begin, group)) - merged).exp()
            )
        )
        part_lse.copy_(merged[..., 0])


def far_backward(
    grad: Tensor,
    query: Tensor,
    summary: Summary,
    selected: Tensor,
    stream: Stream,
    causal: bool,
    delta: Tensor,
    lse: Tensor,
    grad_query: Tensor,
) -> Summary:
    """Gradients of the summary; those of the queries are added to grad_query (H_kv, S, group, d) in place.

    `lse` (H_kv, S, group) is that of the whole softmax and `delta` (H_kv, S, group) the sum of grad * output.
    """
    kv_heads, _, group, dim = query.shape
    keys, values = (part.to(grad_query.dtype) for part in summary)
    width, scale = keys.shape[-1], 1 / math.sqrt(dim)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    for chunk in _far_chunks(stream, selected, kv_heads * group, causal, keys.dtype):
        bucket, (begin, end) = chunk.bucket, chunk.rows
        length = bucket.blocks * stream.block

        def rows_of(
            rows: Tensor, bucket: Bucket = bucket, length: int = length, chunk: _Chunk = chunk
        ) -> Tensor:
            """(H_kv, documents, rows * group, ...) of this chunk."""
            return _documents(rows, bucket, length)[:, :, chunk.rows[0] : chunk.rows[1]].flatten(2, 3)

        features = far_query_features(rows_of(query), width)
        chunk_keys = _documents(keys, bucket, bucket.blocks)[:, :, chunk.columns]
        chunk_values = _documents(values, bucket, bucket.blocks)[:, :, chunk.columns]
        chunk_grad = rows_of(grad).to(keys.dtype)
        weights = _far_logits(features, chunk_keys, chunk).sub_(rows_of(lse)[..., None]).exp_()
        _documents(grad_values, bucket, bucket.blocks)[:, :, chunk.columns].add_(
            weights.transpose(-1, -2) @ chunk_grad
        )
        grad_logits = (
            (chunk_grad @ chunk_values.transpose(-1, -2)).sub_(rows_of(delta)[..., None]).mul_(weights)
        )
        _documents(grad_keys, bucket, bucket.blocks)[:, :, chunk.columns].add_(
            grad_logits.transpose(-1, -2) @ features
        )
        to_features = grad_logits @ chunk_keys
        to_query = to_features[..., :dim] * scale
        if width > dim:  # d/dq of (q / sqrt(d))^2 / 2
            to_query.addcmul_(to_features[..., dim:], features[..., :dim], value=scale)
        _documents(grad_query, bucket, length)[:, :, begin:end].add_(
            to_query.unflatten(2, (end - begin, group))
        )
    return Summary(grad_keys, grad_values)
