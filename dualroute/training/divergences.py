"""Distances of a student's distribution p from its teacher's q, with their gradients, in little memory.

In: log p and log q, (C, B) for C tokens and B outcomes (the vocabulary, or a teacher's top k and the rest).
Here: the sum of the divergence, and its gradient by the logits of p.  With g_j the derivative of the
divergence by p_j, that is p_j (g_j − Σ p g).  Next: :mod:`~dualroute.training.distillation_losses`.

The surprising fact: both arguments are scratch paper.  At these sizes the time goes into memory, so every
function overwrites log p and log q, which the caller made for it alone.  log q may be −∞ in an outcome that
the teacher excludes; then forward_kl and jsd are finite, and reverse_kl is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def forward_kl(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """g = −q / p, so p (g − Σ p g) = p − q."""
    difference = log_q - log_p
    q = log_q.exp_()
    distance = _expectation(q, difference).sum()
    return distance, log_p.exp_().sub_(q)


def reverse_kl(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """g = log(p / q) + 1; the 1 cancels."""
    difference = log_q.neg_().add_(log_p)
    p = log_p.exp_()
    distance = (p * difference).sum(1, keepdim=True)
    return distance.sum(), difference.sub_(distance).mul_(p)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """g = (1 − β) log(p / m): the derivatives through m of both terms cancel but for constants."""
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    from_teacher = log_q - log_m
    of_teacher = _expectation(log_q.exp_(), from_teacher).sum()
    difference = torch.sub(log_p, log_m, out=log_m)
    p = log_p.exp_()
    of_student = (p * difference).sum(1, keepdim=True)
    distance = beta * of_teacher + (1 - beta) * of_student.sum()
    return distance, difference.sub_(of_student).mul_(p).mul_(1 - beta)


def _expectation(probabilities: Tensor, values: Tensor) -> Tensor:
    """Σ p v (C,), in the memory of ``values``; nothing where p is 0, though v be infinite there."""
    return values.masked_fill_(probabilities == 0, 0.0).mul_(probabilities).sum(1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
}
