"""The distillation loss of Liger (https://github.com/linkedin/Liger-Kernel) in the place of our own.

In and out are those of :func:`~dualroute.distillation.losses.chunked_distillation`; here the rows
with a label go to ``LigerFusedLinearJSDLoss``, which also works chunk by chunk and is compiled.

Its β of 0 and 1 are forward and reverse KL, and at 1/2 it agrees with ours; in between,
versions of it have disagreed on which side β weighs, so that is refused.  On a CPU its losses and gradients
have been compared with ours (liger-kernel 0.8.5, tests/distillation/test_liger.py); it has not been run on
a GPU.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dualroute.distillation.losses import DistillationSums, Logits, Objective
from dualroute.errors import UserError
from dualroute.training.step.losses import chunked_cross_entropy, labelled_rows

_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def check_liger(objective: Objective, *, truncated: bool) -> None:
    """Raises UserError where Liger is not there or has no such loss."""
    if not torch.cuda.is_available():
        raise UserError("distill.backend liger needs a CUDA device: use auto or chunked here")
    if find_spec("liger_kernel") is None:
        raise UserError("distill.backend liger needs Liger: pip install liger-kernel, or use chunked")
    if truncated:
        raise UserError("distill.backend liger needs the whole distribution of the teacher: use chunked")
    if objective.z_loss:
        raise UserError("distill.backend liger has no train.z_loss: set it to 0, or use chunked")
    if objective.loss == "jsd" and objective.beta != 0.5:
        raise UserError(f"distill.backend liger with distill.beta {objective.beta}: use 0.5, or chunked")


def liger_distillation(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: Logits,
    objective: Objective,
    *,
    ignore_index: int = -100,
    rows: Tensor | None = None,
) -> DistillationSums:
    """As :func:`chunked_distillation`, but ``z_sum`` is 0 because Liger does not tell it."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    if rows is None:
        rows = labelled_rows(hidden, weight, labels, ignore_index)
    ce_factor, kl_factor, _ = objective.factors
    count = torch.full((), len(rows), device=hidden.device)
    zero = hidden.new_zeros((), dtype=torch.float32)
    if not len(rows):
        return DistillationSums((hidden.sum() + weight.sum()) * 0.0, zero, zero, count, zero)
    loss: Any = LigerFusedLinearJSDLoss(
        weight_hard_loss=ce_factor,
        weight_soft_loss=kl_factor,
        beta=_BETA[objective.loss],
        ignore_index=ignore_index,
        temperature=objective.temperature,
        return_soft_hard_loss=True,
    )
    total, soft, hard = loss(hidden[rows], weight, teacher.hidden[rows], teacher.weight, labels[rows])
    loss_sum = (hard * count).detach()
    if not ce_factor:  # then Liger leaves it out
        with torch.no_grad():
            loss_sum = chunked_cross_entropy(
                hidden, weight, labels, ignore_index=ignore_index, rows=rows
            ).loss_sum
    return DistillationSums(total * count, loss_sum, zero, count, (soft * count).detach())
