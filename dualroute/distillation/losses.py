"""What a student is told by its teacher: divergences of two next-token distributions, mixed with the loss.

In: hidden states of student (N, D) and teacher (N, D_t), the output weights of both, labels (N,); or of the
teacher only its ``k`` likeliest tokens (:class:`TopK`).  Here, per token with a label, at temperature T:

    p = softmax(s / T), q = softmax(t / T)          of the student's logits s and the teacher's t
    forward_kl   Σ q log(q / p)                     mean-seeking (Hinton et al. 2015, arXiv:1503.02531)
    reverse_kl   Σ p log(p / q)                     mode-seeking (MiniLLM, Gu et al. 2023, arXiv:2306.08543)
    jsd          β Σ q log(q / m) + (1 − β) Σ p log(p / m),  m = β q + (1 − β) p
                 (generalised Jensen–Shannon, GKD, Agarwal et al. 2023, arXiv:2306.13649, eq. 1)

    total = ce_weight · CE + kl_weight · T² · divergence + z_loss · logsumexp(s)²

T² makes the size of the divergence's gradient independent of T (Hinton et al., §2).  The divergences and
their gradients are in :mod:`~dualroute.distillation.divergences`.

The truncated teacher costs no special formula.  The student's logits outside the top k
are replaced by one logit, their logsumexp: a softmax of k + 1 logits has exactly the summed probability as
its last entry, and no 1 − Σ p ever cancels.  The gradient of that logit is spread by softmax over the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dualroute.distillation.divergences import DIVERGENCES
from dualroute.training.step.losses import (
    automatic_chunk_size,
    chunked_loss,
    labelled_rows,
    matmul,
    matmul_dtype,
)

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True)
class Objective:
    """What is minimised; see the module's docstring.

    Attributes:
        loss: The divergence.
        temperature: T of both distributions.
        beta: β of ``jsd``, in (0, 1).
        kl_weight: Of the divergence, times T².
        ce_weight: Of the cross-entropy against the labels.
        z_loss: Of the squared log-normaliser.
    """

    loss: DivergenceName = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    z_loss: float = 0.0

    @property
    def factors(self) -> tuple[float, float, float]:
        """Of the sums of cross-entropy, divergence and squared log-normaliser in the total."""
        return self.ce_weight, self.kl_weight * self.temperature**2, self.z_loss


class Logits(NamedTuple):
    """A teacher's whole distribution: hidden (N, D_t) after its last norm, and output weight (V, D_t)."""

    hidden: Tensor
    weight: Tensor


class TopK(NamedTuple):
    """A teacher's distribution cut down at the temperature at which it will be used.

    Attributes:
        log_probs: (N, k) of the likeliest tokens; need not be normalised exactly (they may be rounded).
        ids: (N, k) their ids, int64 or int32.
        rest: (N,) logarithm of the mass of all other tokens together; ignored where k is the vocabulary.
    """

    log_probs: Tensor
    ids: Tensor
    rest: Tensor


class DistillationSums(NamedTuple):
    """Sums over the tokens whose label is not ignored.

    Attributes:
        total: The objective, 0-dim; the only differentiable member.
        loss_sum: Of the cross-entropy in nats, 0-dim, detached, whatever its weight.
        z_sum: Of the squared log-normalisers, 0-dim, detached.
        count: Number of tokens in the sums, 0-dim int64.
        divergence_sum: Of the divergence in nats at temperature T, without T² and weight, 0-dim, detached.
    """

    total: Tensor
    loss_sum: Tensor
    z_sum: Tensor
    count: Tensor  # type: ignore[assignment]  # a tuple also has a method of this name
    divergence_sum: Tensor


def chunked_distillation(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: Logits | TopK,
    objective: Objective,
    *,
    chunk_size: int | None = None,
    ignore_index: int = -100,
    rows: Tensor | None = None,
) -> DistillationSums:
    """The objective over a large vocabulary; neither model's [tokens, vocab] matrix exists.

    Arithmetic as in :func:`~dualroute.training.step.losses.chunked_cross_entropy`; rows whose label is
    ignored are dropped before anything is computed, the teacher's too.  No gradient goes to the teacher.

    Args:
        hidden: (N, D) the student's hidden states.
        weight: (V, D) the student's output weight.
        labels: (N,) int64 target ids in [0, V), or ``ignore_index``.
        teacher: What the teacher says of the same rows.
        objective: What is minimised.
        chunk_size: Rows whose logits exist at the same time; null bounds them by memory.  Four matrices
            (chunk, V) are needed beside each other, five at a temperature.
        ignore_index: Label of rows that do not count.
        rows: (R,) the rows that do count, their labels and the teacher's ids known to be in the vocabulary;
            null finds and checks them, for which a GPU is waited for.

    Returns:
        The sums.  That of a divergence that is infinite (reverse_kl where a truncated teacher leaves no mass
        outside its top k) is infinite.

    Raises:
        ValueError: Shapes do not fit; or, without ``rows``, a label or id is outside the vocabulary, or the
            divergence is infinite.
    """
    known = rows is not None
    if rows is None:
        rows = labelled_rows(hidden, weight, labels, ignore_index)
    vocab_size = weight.shape[0]
    if isinstance(teacher, Logits):
        _check_teacher(teacher, len(hidden), vocab_size)
        divergence = partial(_dense_divergence, teacher=teacher, objective=objective)
    else:
        _check_top_k(teacher, len(hidden), vocab_size)
        if not known and len(rows):
            _check_numbers(teacher, rows, vocab_size, objective)
        divergence = partial(_sparse_divergence, teacher=teacher, objective=objective)
    loss = partial(_distillation_chunk, labels=labels, objective=objective, divergence=divergence)
    total, sums = chunked_loss(hidden, weight, rows, loss, objective.factors, chunk_size=chunk_size)
    loss_sum, divergence_sum, z_sum = sums
    count = torch.full((), len(rows), device=hidden.device)
    return DistillationSums(total, loss_sum, z_sum, count, divergence_sum)


def _check_teacher(teacher: Logits, rows: int, vocab_size: int) -> None:
    hidden, weight = teacher
    if hidden.ndim != 2 or len(hidden) != rows or weight.shape != (vocab_size, hidden.shape[1]):
        raise ValueError(
            f"the teacher's hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit "
            f"{rows} rows and a vocabulary of {vocab_size}"
        )


def _check_top_k(teacher: TopK, count: int, vocab_size: int) -> None:
    shape = teacher.log_probs.shape
    if len(shape) != 2 or shape[0] != count or teacher.ids.shape != shape or teacher.rest.shape != shape[:1]:
        raise ValueError(
            f"the teacher's log_probs {tuple(shape)}, ids {tuple(teacher.ids.shape)} and rest "
            f"{tuple(teacher.rest.shape)} do not fit {count} rows: they must be (N, k), (N, k) and (N,)"
        )
    if not 1 <= shape[1] <= vocab_size:
        raise ValueError(f"the teacher's top {shape[1]} do not fit a vocabulary of {vocab_size}")


def _check_numbers(teacher: TopK, rows: Tensor, vocab_size: int, objective: Objective) -> None:
    """A GPU is waited for."""
    lowest, highest = torch.stack(teacher.ids.aminmax()).tolist()
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(f"the teacher's ids {lowest}..{highest} are outside a vocabulary of {vocab_size}")
    wide = teacher.ids.shape[1] == vocab_size
    if not wide and objective.loss == "reverse_kl" and bool(teacher.rest[rows].isinf().any()):
        raise ValueError(INFINITE)


# ------------------------------------------------------------------ one chunk

INFINITE = (
    "reverse_kl is infinite: the teacher's top k hold all of its mass and the student puts some elsewhere; "
    "use forward_kl or jsd, which are finite"
)
_LOG_OF_NOTHING = -1e4  # e to this power is 0, and 0 times it too

#: (log p at T = 1 (C, V), scratch (C, V), rows) → (sum of the divergence, its gradient (C, V) by logits / T,
#: whether p stands in the place of log p now).  The gradient may lie in scratch.
_Divergence = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, bool]]


def _distillation_chunk(
    logits: Tensor,
    rows: Tensor,
    needs_gradient: bool,
    *,
    labels: Tensor,
    objective: Objective,
    divergence: _Divergence,
) -> tuple[Tensor, Tensor | None]:
    """Sums of cross-entropy, divergence and z; gradient of their weighted total by the logits (C, V)."""
    labels = labels[rows]
    own = torch.arange(len(labels), device=labels.device)
    log_p = torch.log_softmax(logits, 1)
    of_labels = log_p[own, labels]
    log_normaliser = logits[own, labels] - of_labels  # (C,)
    distance, gradient, is_p = divergence(log_p, logits, rows)  # the logits' memory is reused from here on
    sums = torch.stack([-of_labels.sum(), distance, log_normaliser.square().sum()])
    if not needs_gradient:
        return sums, None
    # kl_weight · T² of the total, / T of the inner derivative of s / T
    gradient.mul_(objective.kl_weight * objective.temperature)
    if not objective.ce_weight and not objective.z_loss:
        return sums, gradient
    p = log_p if is_p else log_p.exp_()
    if objective.z_loss:
        p.mul_((objective.ce_weight + 2 * objective.z_loss * log_normaliser).unsqueeze(1))
        gradient.add_(p)
    else:
        gradient.add_(p, alpha=objective.ce_weight)
    gradient[own, labels] -= objective.ce_weight
    return sums, gradient


def _teacher_log_probs(teacher: Logits, rows: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """log q (C, V) of some rows."""
    of_matmul = matmul_dtype(*teacher)
    states = teacher.hidden.index_select(0, rows).to(of_matmul)
    logits = matmul(states, teacher.weight.to(of_matmul).t(), dtype)
    return torch.log_softmax(logits if temperature == 1 else logits.div_(temperature), 1)


def _dense_divergence(
    log_p: Tensor, scratch: Tensor, rows: Tensor, *, teacher: Logits, objective: Objective
) -> tuple[Tensor, Tensor, bool]:
    log_q = _teacher_log_probs(teacher, rows, objective.temperature, log_p.dtype)
    as_it_is = objective.temperature == 1
    if not as_it_is:
        log_p = torch.log_softmax(torch.div(log_p, objective.temperature, out=scratch), 1)
    distance, gradient = DIVERGENCES[objective.loss](log_p, log_q, scratch, objective.beta)
    return distance, gradient, as_it_is


def _sparse_divergence(
    log_p: Tensor, scratch: Tensor, rows: Tensor, *, teacher: TopK, objective: Objective
) -> tuple[Tensor, Tensor, bool]:
    ids = teacher.ids[rows].long()  # (C, k)
    log_q = teacher.log_probs[rows].to(log_p.dtype)
    outside = torch.div(log_p, objective.temperature, out=scratch)  # (C, V)
    buckets = outside.gather(1, ids)
    has_rest = ids.shape[1] < log_p.shape[1]
    if has_rest:
        outside.scatter_(1, ids, -math.inf)
        rest = outside.logsumexp(1, keepdim=True)  # the logit of the last bucket
        buckets = torch.cat([buckets, rest], 1)  # (C, k + 1)
        of_rest = teacher.rest[rows].to(log_q.dtype).unsqueeze(1)
        log_q = torch.cat([log_q, of_rest], 1)
    # rounded numbers do not add up to 1; of an empty rest the logarithm is only very small, so that 0 · log 0
    # is 0
    log_q = torch.log_softmax(log_q, 1).clamp_min_(_LOG_OF_NOTHING)
    of_buckets = torch.log_softmax(buckets, 1)
    function = DIVERGENCES[objective.loss]
    distance, gradient = function(of_buckets, log_q, torch.empty_like(log_q), objective.beta)
    if has_rest and objective.loss == "reverse_kl":
        distance = distance.masked_fill(of_rest.isneginf().any(), math.inf)
    if has_rest:  # d rest / d outside_j is the softmax over the rest
        outside.sub_(rest).exp_().mul_(gradient[:, -1:])
    return distance, outside.scatter_(1, ids, gradient[:, : ids.shape[1]]), False


# ------------------------------------------------------------------ a truncated teacher


@torch.no_grad()
def top_k_of(teacher: Logits, k: int, temperature: float = 1.0, *, chunk_size: int | None = None) -> TopK:
    """A teacher's ``k`` likeliest tokens at each row, and the mass outside them, chunk by chunk.

    Args:
        teacher: Hidden states and output weight.
        k: 1 to V.
        temperature: Of the distribution that is cut down; it cannot be changed afterwards.
        chunk_size: Rows whose logits exist at the same time; null bounds them by memory.
    """
    hidden, weight = teacher
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    chunk_size = chunk_size or automatic_chunk_size(len(hidden), weight.shape[0], dtype, hidden.device)
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):  # a teacher's arithmetic is its own
        for rows in torch.arange(len(hidden), device=hidden.device).split(chunk_size):
            log_q = _teacher_log_probs(teacher, rows, temperature, dtype)
            log_probs, ids = log_q.topk(k, dim=1)
            # summed over the others themselves: 1 − Σ would lose a small rest
            parts.append((log_probs, ids, log_q.scatter_(1, ids, -math.inf).logsumexp(1)))
    if not parts:
        empty = torch.zeros(0, k, device=hidden.device, dtype=dtype)
        return TopK(empty, empty.long(), empty[:, 0])
    return TopK(*(torch.cat(column) for column in zip(*parts, strict=True)))
