"""Direct preference optimisation (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290).

In: batches whose examples are pairs of chats, with the log-probability of each under the model that the run
began with (:mod:`~dualroute.tasks.dpo.reference`).  Here: with a = log p(chosen) and b = log p(rejected),

    margin = beta · ((a - a_reference) - (b - b_reference))
    loss   = -(1 - s) · log σ(margin) - s · log σ(-margin)

where s is ``task.label_smoothing``: the share of pairs that may be the wrong way round (Mitchell 2023, "a
note on DPO with noisy preferences").  Out: gradients and figures, as of pretraining; a loss is per pair.

The logits of a whole answer are never held: a first pass finds a and b, chunk by chunk, and a second one the
gradient, in which each token of an answer counts alike: by how much the loss changes with its answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.data.reader import IGNORE_INDEX
from dualroute.data.window_module import Batch
from dualroute.model import DualRoutingTransformer
from dualroute.tasks.data.encode import Encoded
from dualroute.tasks.kind import Kind
from dualroute.tasks.module import Finetune
from dualroute.training.step.losses import chunked_loss


@dataclass
class PreferenceSums:
    """Sums over the pairs of a micro-batch; ``total`` alone is differentiated.

    Attributes:
        loss_sum: Of the loss.
        z_sum: 0; there is no z-loss of pairs.
        count: Pairs.
        correct: Pairs whose margin is above 0.
        margin: Sum of the margins.
    """

    total: Tensor
    loss_sum: Tensor
    z_sum: Tensor
    count: Tensor
    correct: Tensor
    margin: Tensor


def document_numbers(segment_ids: Tensor) -> tuple[Tensor, int]:
    """(B · n,) number of each token's document, -1 for padding, and how many numbers there are, an even one.

    Documents 2k and 2k + 1 are a pair: ``segment_ids`` (B, n) count from 1 in each window.  Padding alone, as
    a rank may have it where windows do not divide by the ranks, counts as a pair without tokens.
    """
    most = max(int(segment_ids.max()), 1)
    most += most % 2
    windows = torch.arange(len(segment_ids), device=segment_ids.device)[:, None] * most
    numbers = torch.where(segment_ids > 0, windows + segment_ids - 1, -1).flatten()
    return numbers, most * len(segment_ids)


def answer_log_probabilities(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor, numbers: Tensor, count: int
) -> Tensor:
    """(count,) log-probability of the labelled tokens of each document, without a gradient.

    Args:
        hidden: (N, D).
        weight: (V, D).
        labels: (N,).
        rows: (R,) those whose label counts.
        numbers: (N,) of documents.
        count: Documents.
    """
    nll = torch.zeros(len(labels), dtype=torch.float64, device=hidden.device)

    def of_chunk(logits: Tensor, chunk: Tensor, needs_gradient: bool) -> tuple[Tensor, None]:
        of_label = logits.gather(1, labels[chunk].unsqueeze(1)).squeeze(1)
        nll[chunk] = (logits.logsumexp(1) - of_label).double()
        return logits.new_zeros(1), None

    with torch.no_grad():
        chunked_loss(hidden.detach(), weight.detach(), rows, of_chunk, [1.0])
    return torch.zeros(count, dtype=torch.float64, device=hidden.device).index_add(
        0, numbers[rows], -nll[rows]
    )


def preference_loss(margin: Tensor, smoothing: float) -> Tensor:
    """Of each pair, for its ``margin``."""
    loss = -(1 - smoothing) * F.logsigmoid(margin)
    return loss - smoothing * F.logsigmoid(-margin) if smoothing else loss


def preference_sums(
    hidden: Tensor, weight: Tensor, batch: Batch, *, beta: float, smoothing: float
) -> PreferenceSums:
    """The loss of a batch of pairs; see the module's docstring.

    Args:
        hidden: (B · n, D) hidden states.
        weight: (V, D) output weight.
        batch: ``labels``, ``segment_ids`` and ``reference`` (B, n): log-probabilities of documents under the
            reference, whose tokens' entries are summed.
        beta: How much a difference counts.
        smoothing: Share of pairs that may be the wrong way round.
    """
    labels = batch["labels"].flatten()
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    numbers, count = document_numbers(batch["segment_ids"])
    found = answer_log_probabilities(hidden, weight, labels, rows, numbers, count)
    inside = (numbers >= 0).nonzero().squeeze(1)
    reference = torch.zeros_like(found).index_add(
        0, numbers[inside], batch["reference"].flatten()[inside].double()
    )
    gain = (found - reference).view(-1, 2)  # (pairs, sides)
    present = torch.zeros_like(found).index_fill(0, numbers[rows], 1.0).view(-1, 2).amin(1) > 0
    margin = beta * (gain[:, 0] - gain[:, 1])
    loss = torch.where(present, preference_loss(margin, smoothing), 0.0)
    slope = -(1 - smoothing) * torch.sigmoid(-margin) + smoothing * torch.sigmoid(margin)
    slope = torch.where(present, beta * slope, 0.0)  # of the loss, by log p of the chosen side
    of_row = torch.stack([slope, -slope], 1).flatten()[numbers.clamp_min(0)]  # (B · n,)

    def of_chunk(logits: Tensor, chunk: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
        factor = of_row[chunk].to(logits.dtype)
        own = torch.arange(len(chunk), device=chunk.device)
        log_probability = logits.log_softmax(1)
        sums = (factor * log_probability[own, labels[chunk]]).sum().view(1)
        if not needs_gradient:
            return sums, None
        gradient = log_probability.exp_().mul_(-factor.unsqueeze(1))
        gradient[own, labels[chunk]] += factor
        return sums, gradient

    moves, _ = chunked_loss(hidden, weight, rows, of_chunk, [1.0])
    loss_sum = loss.sum()
    return PreferenceSums(
        moves - moves.detach() + loss_sum.to(moves.dtype),
        loss_sum.detach(),
        torch.zeros_like(loss_sum),
        present.sum(),
        (present & (margin > 0)).sum().double(),
        torch.where(present, margin, 0.0).sum(),
    )


class Prefer(Finetune):
    """Training on preference pairs.

    Args:
        kind, validation, arguments: As of :class:`Finetune`.
        add_reference: Called with the model when it has its weights, before the first batch is made; null
            where the pairs have their reference already.
    """

    writes_metrics = False  # those of pairs

    def __init__(
        self,
        kind: Kind,
        validation: Encoded,
        add_reference: Callable[[DualRoutingTransformer], None] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(kind, validation, **arguments)
        self._add_reference = add_reference
        metric = kind.task.metric or "accuracy"
        self.best_by = (metric, kind.metrics.get(metric, False))

    def on_fit_start(self) -> None:
        if self._add_reference is not None:
            self._add_reference(self.model)

    def _loss_sums(self, batch: Batch, z_loss: float = 0.0) -> PreferenceSums:
        task = self.kind.task
        loss = partial(preference_sums, batch=batch, beta=task.beta, smoothing=task.label_smoothing)
        sums: PreferenceSums = self.model.head(self.hidden_states(batch).flatten(0, 1), loss)
        return sums

    def figures(self, sums: Any) -> dict[str, Tensor]:
        return {"accuracy": sums.correct, "margin": sums.margin}

    def on_validation_epoch_start(self) -> None:
        self._val_sums = torch.zeros(4, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        sums = self._loss_sums(batch)
        self._val_sums += torch.stack([sums.loss_sum, sums.count.double(), sums.correct, sums.margin])

    def on_validation_epoch_end(self) -> None:
        loss, count, correct, margin = self.trainer.strategy.reduce(self._val_sums, reduce_op="sum").tolist()
        pairs = max(count, 1)
        self.validation_metrics = {
            "loss": loss / pairs,
            "accuracy": correct / pairs,
            "margin": margin / pairs,
        }
