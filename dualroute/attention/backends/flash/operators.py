"""Flash attention over many sequences in one launch: torch's own operator, which CUDA builds of torch bring.

In: queries (T_q, H, d), keys and values (T_k, H_kv, d) of sequences that lie one after the other, and
`Spans`, which say where each begins. Out: `forward` gives the output (T_q, H, d) and the log-sum-exp
(H, T_q); `backward` the three gradients.

The backward operator takes the output and the log-sum-exp as arguments. Given those of a *larger* softmax, of
which these keys are one part, its gradients are the exact ones of the joint softmax (see
`backends.torch.tile_attention`): so a token may read its keys in several calls.

The operators are private (`aten::_flash_attention_forward`, `_backward`); `torch.nn.attention.varlen_attn` is
the same call without the given output. `SCHEMAS` is what they are called by, and a test holds it against the
installed torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.utils.deterministic
from torch import Tensor

#: Arguments of the operators, in the order in which they are given here.
SCHEMAS = {
    "_flash_attention_forward": (
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
        "return_debug_mask", "scale", "window_size_left", "window_size_right",
    ),
    "_flash_attention_backward": (
        "grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k",
        "dropout_p", "is_causal", "rng_state", "unused", "scale", "window_size_left", "window_size_right",
    ),
}  # fmt: skip


class Spans(NamedTuple):
    """Sequence i has queries `query[i]` to `query[i + 1]` and keys `key[i]` to `key[i + 1]`, or none of them.

    `query` and `key` (n + 1,) are int32 on the device; the longest of each are known to the host. A query
    sees `left` keys before its own place and `right` behind it, -1 = all.
    """

    query: Tensor
    key: Tensor
    max_query: int
    max_key: int
    left: int = -1
    right: int = -1

    @property
    def causal(self) -> bool:
        return (self.left, self.right) == (-1, 0)


def forward(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    """Output (T_q, H, d) in the type of the queries and log-sum-exp (H, T_q) in float32.

    Rows of a sequence without keys are 0, and their log-sum-exp is of no use.
    """
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        _rows(query),
        _rows(key),
        _rows(value),
        spans.query,
        spans.key,
        max(spans.max_query, 2),  # for 1 and grouped heads, the operator makes another shape
        spans.max_key,
        0.0,
        spans.causal,
        False,
        window_size_left=spans.left,
        window_size_right=spans.right,
    )
    return out, lse


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, spans: Spans
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values in their types; `out` and `lse` may be of a larger softmax.

    A row whose log-sum-exp is huge gives and gets no gradient. The same call gives the same bits each time.
    """
    no_dropout = torch.empty(2, dtype=torch.uint64, device=query.device)
    with _repeatable():
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            _rows(grad),
            _rows(query),
            _rows(key),
            _rows(value),
            _rows(out),
            lse.contiguous(),
            spans.query,
            spans.key,
            spans.max_query,
            spans.max_key,
            0.0,
            spans.causal,
            no_dropout,
            torch.empty(0, device=query.device),
            window_size_left=spans.left,
            window_size_right=spans.right,
        )
    return grads


def _rows(rows: Tensor) -> Tensor:
    """The operators take any strides but for the last dimension."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@contextmanager
def _repeatable() -> Iterator[None]:
    """The backward kernel adds up the gradients of queries in a fixed order instead of by atomics.

    It asks torch's global flag; that flag also fills fresh memory, which is not wanted here.
    """
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    if was == (True, False):
        yield
        return
    settings.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        settings.fill_uninitialized_memory = filled
