"""Distances of a student's distribution p from its teacher's q, with their gradients, in little memory.

In: log p and log q, (C, B) for C tokens and B outcomes (the vocabulary, or a teacher's top k and the rest).
Here: the sum of the divergence, and its gradient by the logits of p.  With g_j the derivative of the
divergence by p_j, that is p_j (g_j − Σ p g).  Next: :mod:`~dualroute.distillation.losses`.

All three arguments are scratch paper.  At these sizes the time goes into memory, so
every function works in the place of what it was given, and leaves p itself where log p stood.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: (log p, log q, scratch, β), each (C, B) and finite → (sum of the divergence, gradient (C, B)); p then
#: stands in the place of log p.
Divergence = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def forward_kl(log_p: Tensor, log_q: Tensor, scratch: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """g = −q / p, so p (g − Σ p g) = p − q."""
    difference = torch.sub(log_q, log_p, out=scratch)
    q, p = log_q.exp_(), log_p.exp_()
    distance = torch.linalg.vecdot(q, difference).sum()
    return distance, torch.sub(p, q, out=difference)


def reverse_kl(log_p: Tensor, log_q: Tensor, scratch: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """g = log(p / q) + 1; the 1 cancels."""
    difference = torch.sub(log_p, log_q, out=scratch)
    p = log_p.exp_()
    distance = torch.linalg.vecdot(p, difference).unsqueeze(1)  # (C, 1)
    return distance.sum(), difference.sub_(distance).mul_(p)


def jsd(log_p: Tensor, log_q: Tensor, scratch: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """g = (1 − β) log(p / m): the derivatives through m of both terms cancel but for constants."""
    torch.add(log_p, math.log1p(-beta), out=scratch)
    log_m = torch.logaddexp(scratch, log_q + math.log(beta), out=scratch)
    from_teacher = log_q - log_m
    of_teacher = torch.linalg.vecdot(log_q.exp_(), from_teacher).sum()
    difference = torch.sub(log_p, log_m, out=scratch)
    p = log_p.exp_()
    of_student = torch.linalg.vecdot(p, difference).unsqueeze(1)  # (C, 1)
    distance = beta * of_teacher + (1 - beta) * of_student.sum()
    return distance, difference.sub_(of_student).mul_(p).mul_(1 - beta)


DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}
