"""The sink: the first block of a document, read exactly by every token outside of it.

In: queries (H_kv, S, group, d), keys and values (H_kv, S, d) of a stream. Out: `merge_sink` adds the sink's
keys to a running (output, log-sum-exp); `sink_backward` gives their gradients.

Nothing is gathered. All tokens behind the first block read the same keys, so each
document is one ordinary rectangle of attention, its rows x one block; and since there is a second block, the
first one is full and needs no mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dualroute.attention.backends.torch.tile_attention import attend, attend_backward
from dualroute.attention.core.layout import Bucket, Stream


def merge_sink(query: Tensor, key: Tensor, value: Tensor, stream: Stream, out: Tensor, lse: Tensor) -> None:
    """Add the sinks, in place, to out (H_kv, S, group, d) and lse (H_kv, S, group) of other keys."""
    for bucket in _long(stream):
        part, part_lse = attend(
            _readers(query, bucket, stream.block),
            _sinks(key, bucket, stream.block),
            _sinks(value, bucket, stream.block),
        )
        rows, rows_lse = (_behind(whole, bucket, stream.block) for whole in (out, lse))
        part, part_lse = (_unfold(piece, bucket) for piece in (part, part_lse))
        merged = torch.logaddexp(rows_lse, part_lse)
        rows.mul_((rows_lse - merged).exp_()[..., None])
        rows.addcmul_(part, (part_lse - merged).exp_()[..., None])
        rows_lse.copy_(merged)


def sink_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stream: Stream,
    out: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Add the sinks' part of the gradients in place; `out` and `lse` are those of the whole softmax.

    grad_key and grad_value are (H_kv, S, d), grad_query is (H_kv, S, group, d).
    """
    for bucket in _long(stream):
        to_query, to_key, to_value = attend_backward(
            _readers(grad, bucket, stream.block),
            _readers(query, bucket, stream.block),
            _sinks(key, bucket, stream.block),
            _sinks(value, bucket, stream.block),
            _readers(out, bucket, stream.block),
            _readers(lse, bucket, stream.block),
        )
        _behind(grad_query, bucket, stream.block).add_(_unfold(to_query, bucket))
        for total, part in ((grad_key, to_key), (grad_value, to_value)):
            documents = _documents(total, bucket, stream.block)
            documents[:, :, : stream.block].add_(part.view(documents[:, :, : stream.block].shape))


def _long(stream: Stream) -> Iterator[Bucket]:
    """The buckets whose documents have a block behind the first one."""
    return (bucket for bucket in stream.buckets if bucket.blocks > 1)


def _documents(rows: Tensor, bucket: Bucket, block: int) -> Tensor:
    """(H_kv, S, ...) -> (H_kv, documents, length, ...) view of one bucket."""
    begin, length = bucket.first_block * block, bucket.blocks * block
    return rows[:, begin : begin + bucket.documents * length].unflatten(1, (bucket.documents, length))


def _behind(rows: Tensor, bucket: Bucket, block: int) -> Tensor:
    """(H_kv, documents, length - block, ...) view: all slots but those of the sink."""
    return _documents(rows, bucket, block)[:, :, block:]


def _readers(rows: Tensor, bucket: Bucket, block: int) -> Tensor:
    """(H_kv, S, group, ...) -> (H_kv * documents, group, length - block, ...), as `attend` takes queries."""
    return _behind(rows, bucket, block).flatten(0, 1).transpose(1, 2)


def _unfold(rows: Tensor, bucket: Bucket) -> Tensor:
    """What `attend` gives for `_readers`, as (H_kv, documents, length - block, group, ...) again."""
    return rows.transpose(1, 2).unflatten(0, (-1, bucket.documents))


def _sinks(rows: Tensor, bucket: Bucket, block: int) -> Tensor:
    """(H_kv, S, d) -> (H_kv * documents, 1, block, d)."""
    return _documents(rows, bucket, block)[:, :, :block].flatten(0, 1)[:, None]
