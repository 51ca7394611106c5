"""Cross-entropy over a large vocabulary without the [tokens, vocab] matrix.

Hidden states (N, D) come from the model's final norm, the output weight (V, D) from its head, labels (N,)
from the batch; what leaves are sums over tokens, which the LightningModule divides by the number of targets
of the whole global batch.  Per token, with logits s = W h and label y:

    loss = logsumexp(s) - s_y                   next-token loss, nats
    z    = logsumexp(s)²                        keeps the normaliser near 1 (PaLM, Chowdhery et al. 2022, §5)
    u    = logsumexp(s) - mean(s)               smoothed labels: (1 - a) · loss + a · u (Szegedy et al. 2016)
    dloss/ds = softmax(s) - onehot(y),  dz/ds = 2 · logsumexp(s) · softmax(s)

The gradient is computed in the *forward*.  A chunk's logits are made, turned into the
loss, then (in the same memory) into their own gradient, multiplied back into the gradients of hidden states
and weight, and forgotten; the backward only scales those two by the incoming number.  So one chunk of logits
is alive at any time, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES_CPU = 32 * 2**20
# every chunk adds into the whole (V, D) weight gradient: on a GPU it takes about two thousand rows before
# that sum costs less than the matmul it belongs to
CHUNK_BYTES_GPU = 256 * 2**20


class CrossEntropySums(NamedTuple):
    """Sums over the tokens whose label is not ignored.

    Attributes:
        total: loss_sum + z_loss · z_sum, 0-dim; the only differentiable member.
        loss_sum: Sum of the next-token losses in nats, 0-dim, detached.
        z_sum: Sum of squared log-normalisers, 0-dim, detached.
        count: Number of tokens in the sums, 0-dim int64.
    """

    total: Tensor
    loss_sum: Tensor
    z_sum: Tensor
    count: Tensor  # type: ignore[assignment]  # a tuple also has a method of this name


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_size: int | None = None,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    rows: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> CrossEntropySums:
    """Sum of the cross-entropy of ``hidden @ weight.T`` against ``labels``.

    Matmuls run in the autocast dtype where autocast is on (bfloat16), else in the inputs' dtype; softmax and
    the accumulation of the weight's gradient run in float32 (float64 for float64 inputs).  Rows whose label
    is ignored are dropped before anything is computed.

    Args:
        hidden: (N, D) hidden states.
        weight: (V, D) output weight; row v belongs to token id v.
        labels: (N,) int64 target ids in [0, V), or ``ignore_index``.
        chunk_size: Rows whose logits exist at the same time; null bounds them by memory.
        z_loss: Factor of the squared log-normaliser in ``total``.
        ignore_index: Label of rows that do not count.
        rows: (R,) the rows that do count, their labels known to be in the vocabulary; null finds and checks
            them, which makes the host wait for a GPU.
        label_smoothing: Share of a label's weight in ``total`` that is spread over the vocabulary.

    Returns:
        CrossEntropySums in float32 (float64 for float64 inputs).  Only one backward order is defined: the
        gradient of ``total`` is not itself differentiable.

    Raises:
        ValueError: Shapes do not fit, a label is outside the vocabulary, or ``chunk_size`` is below 1.
    """
    if rows is None:
        rows = labelled_rows(hidden, weight, labels, ignore_index)
    share = float(label_smoothing)
    loss = partial(_cross_entropy_chunk, labels=labels, z_loss=float(z_loss), smoothing=share)
    factors = (1.0 - share, float(z_loss), share)
    total, sums = chunked_loss(hidden, weight, rows, loss, factors, chunk_size=chunk_size)
    loss_sum, z_sum, _ = sums
    return CrossEntropySums(total, loss_sum, z_sum, torch.full((), len(rows), device=hidden.device))


def labelled_rows(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Numbers (valid,) of the rows whose label counts.

    Raises:
        ValueError: Shapes do not fit, or a label is outside the vocabulary.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit: "
            f"they must be (N, D) and (V, D)"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit: they must hold one id for each of the "
            f"{len(hidden)} hidden rows"
        )
    rows = (labels != ignore_index).nonzero().squeeze(1)
    _check_labels(labels, rows, weight.shape[0])
    return rows


#: (logits (C, V) that may be overwritten, their rows (C,), whether a gradient is wanted) → (sums (S,) over
#: the rows, gradient (C, V) of the weighted sum with respect to the logits, or None)
ChunkLoss = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    loss: ChunkLoss,
    factors: Sequence[float],
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A loss of logits ``hidden[rows] @ weight.T`` of which only a chunk exists at a time.

    Args:
        hidden: (N, D).
        weight: (V, D).
        rows: (R,) the rows of ``hidden`` that count.
        loss: What is made of a chunk's logits.
        factors: Of the S sums in the total; ``loss`` has them in its gradient.
        chunk_size: Rows whose logits exist at the same time; null bounds them by memory.

    Returns:
        The weighted total, 0-dim, the only one to be differentiated, and the sums (S,).

    Raises:
        ValueError: ``chunk_size`` is below 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: it must be at least 1, or null")
    total, sums = _apply(hidden, weight, rows, loss, tuple(factors), chunk_size, torch.is_grad_enabled())
    return total, sums


def automatic_chunk_size(rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows per chunk so that a chunk of logits in ``dtype`` stays within a fixed memory, in equal chunks."""
    budget = CHUNK_BYTES_CPU if device.type == "cpu" else CHUNK_BYTES_GPU
    limit = max(1, budget // (vocab_size * dtype.itemsize))
    chunks = max(1, -(-rows // limit))
    return max(1, -(-rows // chunks))


def matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    # float16 cannot hold the probabilities of a large vocabulary (they fall below 6e-8), and here no gradient
    # scaler has had its turn yet: those matmuls run in float32
    return torch.float32 if dtype == torch.float16 else dtype


def matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` in ``dtype``; CUDA can keep the float32 accumulator of a bfloat16 product."""
    if left.is_cuda and left.dtype == torch.bfloat16 and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor,
        loss: ChunkLoss,
        factors: tuple[float, ...],
        chunk_size: int | None,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = matmul_dtype(hidden, weight)
        sum_dtype = torch.promote_types(dtype, torch.float32)
        needs_hidden, needs_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if needs_weight else None
        sums = torch.zeros(len(factors), dtype=sum_dtype, device=hidden.device)

        count = len(rows)
        chunk_size = chunk_size or automatic_chunk_size(count, weight.shape[0], sum_dtype, hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            weight = weight.to(dtype)
            for begin in range(0, count, chunk_size):
                chunk = rows[begin : begin + chunk_size]  # (C,)
                states = hidden.index_select(0, chunk).to(dtype)  # (C, D)
                logits = matmul(states, weight.t(), sum_dtype)  # (C, V)
                chunk_sums, gradient = loss(logits, chunk, needs_hidden or needs_weight)
                del logits
                sums += chunk_sums
                if gradient is None:
                    continue
                gradient = gradient.to(dtype)  # (C, V)
                if grad_hidden is not None:
                    grad_hidden.index_copy_(0, chunk, torch.mm(gradient, weight).to(hidden.dtype))
                if grad_weight is not None and dtype == sum_dtype:
                    grad_weight.addmm_(gradient.t(), states)
                elif grad_weight is not None:
                    grad_weight += matmul(gradient.t(), states, sum_dtype)
                del gradient
        ctx.save_for_backward(grad_hidden, grad_weight)
        total = torch.zeros_like(sums[0])
        for factor, part in zip(factors, sums, strict=True):
            total = total + factor * part
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *detached: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            # autograd casts to the weight's own dtype, after the scaling
            grad_weight = grad_weight * grad_total
        return grad_hidden, grad_weight, None, None, None, None, None


# the number of rows differs from batch to batch: compiled, this would be compiled anew for each
_apply = torch.compiler.disable(_ChunkedLoss.apply)


def _cross_entropy_chunk(
    logits: Tensor, rows: Tensor, needs_gradient: bool, *, labels: Tensor, z_loss: float, smoothing: float
) -> tuple[Tensor, Tensor | None]:
    """Loss, z and u of one chunk, and the logits' gradient in the logits' own memory."""
    labels = labels[rows]
    own = torch.arange(len(labels), device=labels.device)
    label_logits = logits[own, labels]
    mean = logits.mean(1) if smoothing else label_logits
    top = logits.amax(1, keepdim=True)
    weights = logits.sub_(top).exp_()  # the logits' memory is reused from here on
    normaliser = weights.sum(1, keepdim=True)  # (C, 1)
    log_normaliser = (normaliser.log() + top).squeeze(1)
    losses = (log_normaliser - label_logits, log_normaliser.square(), log_normaliser - mean)
    sums = torch.stack([loss.sum() for loss in losses])
    if not needs_gradient:
        return sums, None
    gradient = weights.mul_((1 + 2 * z_loss * log_normaliser).unsqueeze(1) / normaliser)
    gradient[own, labels] -= 1 - smoothing
    if smoothing:
        gradient -= smoothing / gradient.shape[1]
    return sums, gradient


def _check_labels(labels: Tensor, rows: Tensor, vocab_size: int) -> None:
    if len(rows) == 0:
        return
    lowest, highest = torch.stack(labels[rows].aminmax()).tolist()
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"a label is {wrong}, outside the {vocab_size} ids that the output weight knows")
