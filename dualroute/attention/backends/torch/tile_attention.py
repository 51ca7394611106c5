"""Attention over one set of tiles, with its log-sum-exp: the only place that touches a private operator.

In: queries (batch, heads, rows, d), keys and values (batch, kv_heads, keys, d); kv_heads divides heads.
Out: `attend` gives the attention output and the log-sum-exp of its logits; `attend_backward` the three
gradients.

`attend_backward` may be given the output and the log-sum-exp of a *larger* softmax, of
which these keys are one part. With P = exp(logits - lse) and delta = sum(dO * O), both taken from the merged
result, the formulas of flash attention (Dao et al., arXiv 2205.14135, algorithm 4) are the exact gradient of
the joint softmax with respect to this part. So a token may read its keys in several pieces and nothing large
is ever saved.

On a CPU this is `aten::_scaled_dot_product_flash_attention_for_cpu`, which is private; elsewhere, or should
torch take it away, plain matmuls do the same. Logits and all sums are float32 there too; the weights, and the
gradients of logits, are multiplied in the type of the keys, as flash attention does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dualroute.attention.core.precision import NEG_INF, accumulation_dtype, wide_product

_HAS_FLASH = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu") and hasattr(
    torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward"
)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d) + mask) v, and log(sum(exp(.))) of the same logits.

    Args:
        query: (b, h, r, d).
        key, value: (b, h_kv, s, d); query head i reads key head i // (h / h_kv).
        mask: added to the logits, (b or 1, 1, r or 1, s), 0 or -inf, in `accumulation_dtype`. Every row must
            see a key.
        causal: row i sees keys 0..i (only with r == s).

    Returns:
        output (b, h, r, d) and log-sum-exp (b, h, r), both in `accumulation_dtype`.
    """
    if _use_flash(query):
        q, k, v = _upcast(query, key, value)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask
        )
    return _attend_plain(query, key, value, mask, causal)


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value for `grad` = d loss / d output, in `accumulation_dtype`.

    `output` and `lse` are those of the whole softmax; see the module's docstring.
    """
    if _use_flash(query):
        grad, q, k, v, output = _upcast(grad, query, key, value, output)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, output, lse, 0.0, causal, attn_mask=mask
        )
    return _attend_backward_plain(grad, query, key, value, output, lse, mask, causal)


def _use_flash(query: Tensor) -> bool:
    return _HAS_FLASH and query.device.type == "cpu"


def _upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    # The CPU operator is slow on short tiles in half precision, and rounds: convert the tile instead.
    return tuple(t.to(accumulation_dtype(t.dtype)) for t in tensors)


def _logits(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """(b, h_kv, g, r, s) scaled and masked logits in the accumulation type."""
    batch, heads, rows, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, -1, dim)  # (b, h_kv, g * r, d)
    logits = wide_product(grouped, key.transpose(-1, -2))
    logits = (logits / math.sqrt(dim)).view(batch, kv_heads, heads // kv_heads, rows, keys)
    if mask is not None:
        logits = logits + mask[:, :, None]
    if causal:
        above = torch.ones(rows, keys, dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill(above, NEG_INF)
    return logits


def _attend_plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, dim = query.shape
    logits = _logits(query, key, mask, causal)
    lse = torch.logsumexp(logits, -1)
    weights = (logits - lse[..., None]).exp().to(value.dtype)
    output = wide_product(weights.flatten(2, 3), value)  # (b, h_kv, g * r, d)
    return output.view(batch, heads, rows, dim), lse.view(batch, heads, rows)


def _attend_backward_plain(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, dim = query.shape
    kv_heads = key.shape[1]
    shape = (batch, kv_heads, -1, dim)
    accumulate = accumulation_dtype(query.dtype)
    logits = _logits(query, key, mask, causal)
    weights = (logits - lse.reshape(batch, kv_heads, -1, rows, 1)).exp().flatten(2, 3)  # (b, h_kv, g * r, s)
    delta = (grad.to(accumulate) * output.to(accumulate)).sum(-1).reshape(batch, kv_heads, -1, 1)
    grad = grad.to(value.dtype).reshape(shape)
    grad_value = wide_product(weights.to(value.dtype).transpose(-1, -2), grad)
    grad_logits = weights * (wide_product(grad, value.transpose(-1, -2)) - delta) / math.sqrt(dim)
    grad_logits = grad_logits.to(query.dtype)
    grad_query = wide_product(grad_logits, key).view(batch, heads, rows, dim)
    grad_key = wide_product(grad_logits.transpose(-1, -2), query.reshape(shape))
    return grad_query, grad_key, grad_value
