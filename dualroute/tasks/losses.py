"""Losses of a task's outputs, summed over targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.data.reader import IGNORE_INDEX
from dualroute.tasks.kind import LossSums


def classification(
    outputs: Tensor,
    labels: Tensor,
    *,
    smoothing: float = 0.0,
    weights: Sequence[float] | None = None,
    z_loss: float = 0.0,
) -> LossSums:
    """Cross-entropy of classes.

    Args:
        outputs: (R, classes), in any float type; the arithmetic is float32 at least.
        labels: (R,) int64, ``IGNORE_INDEX`` where nothing is to be learnt.
        smoothing: Share of a target's weight that is spread over all classes (Szegedy et al. 2016, §7).
        weights: Of each class; their mean over the training targets is 1, so that the sum may be divided by
            the number of targets.
        z_loss: Factor of the squared log-normalisers in the total.
    """
    outputs = outputs.float() if outputs.dtype != torch.float64 else outputs
    wanted = labels != IGNORE_INDEX
    outputs, labels = outputs[wanted], labels[wanted]
    log_normaliser = outputs.logsumexp(1)
    nll = log_normaliser - outputs.gather(1, labels[:, None]).squeeze(1)
    z_sum = log_normaliser.square().sum()
    trained = nll
    if smoothing:
        trained = (1 - smoothing) * nll + smoothing * (log_normaliser - outputs.mean(1))
    if weights is not None:
        trained = trained * torch.tensor(weights, dtype=trained.dtype, device=trained.device)[labels]
    total = trained.sum() + (z_loss * z_sum if z_loss else 0.0)
    return LossSums(total, nll.sum().detach(), z_sum.detach(), labels.new_tensor(len(labels)))


def ctc(outputs: Tensor, labels: Tensor, segments: Tensor) -> LossSums:
    """Connectionist temporal classification of packed recordings, by torch; output 0 is no character.

    Args:
        outputs: (R, characters) of all steps, recording after recording.
        labels: (R,) the characters of each recording at the first of its steps, ``IGNORE_INDEX`` behind them.
        segments: (R,) a number of its own for each recording.
    """
    outputs = outputs.float() if outputs.dtype != torch.float64 else outputs
    log_probs = outputs.log_softmax(1)
    _, lengths = segments.unique_consecutive(return_counts=True)
    sizes = lengths.tolist()
    wanted = labels != IGNORE_INDEX
    counts = torch.stack([part.sum() for part in wanted.split(sizes)]) if sizes else lengths
    loss = outputs.sum() * 0.0  # of a batch without recordings
    if sizes:
        padded = torch.nn.utils.rnn.pad_sequence(log_probs.split(sizes))  # (steps, recordings, characters)
        loss = F.ctc_loss(padded, labels[wanted], lengths, counts, reduction="sum")
    none = torch.zeros_like(loss.detach())
    return LossSums(loss, loss.detach(), none, wanted.sum())


def regression(outputs: Tensor, targets: Tensor) -> LossSums:
    """Squared error of numbers: ``outputs`` (R, 1), ``targets`` (R,) float, NaN where there is none."""
    wanted = ~torch.isnan(targets)
    errors = outputs.float().squeeze(1)[wanted] - targets[wanted].float()
    loss = F.mse_loss(errors, torch.zeros_like(errors), reduction="sum")
    return LossSums(loss, loss.detach(), torch.zeros_like(loss.detach()), wanted.sum())


def within_segments(
    outputs: Tensor, labels: Tensor, bits: Sequence[int], segment_ids: Tensor, rows: Tensor
) -> LossSums:
    """Mean of several cross-entropies over the tokens of a text: which one begins an answer, which ends it.

    Args:
        outputs: (R, len(bits)) scores of each token.
        labels: (R,) int64; the bits of those that a token is the right one for.
        bits: Of each column of ``outputs``.
        segment_ids: (B, n) which text a slot belongs to.
        rows: (R,) places of ``outputs`` in (B · n,).
    """
    outputs = outputs.float() if outputs.dtype != torch.float64 else outputs
    batch, length = segment_ids.shape
    texts = torch.arange(batch, device=rows.device)[:, None] * (length + 1) + segment_ids
    names, group = texts.flatten()[rows].unique(return_inverse=True)  # (G,), (R,)
    highest = outputs.detach().new_full((len(names), outputs.shape[1]), -torch.inf)
    places = group[:, None].expand_as(outputs)
    highest = highest.scatter_reduce(0, places, outputs.detach(), "amax")
    sums = outputs.new_zeros(len(names), outputs.shape[1])
    sums = sums.index_add(0, group, (outputs - highest[group]).exp())
    log_normaliser = sums.log() + highest  # (G, columns)
    wanted = torch.stack([(labels & bit) > 0 for bit in bits], 1) & (labels != IGNORE_INDEX)[:, None]
    nll = (log_normaliser[group] - outputs)[wanted].sum() / len(bits)
    answered = torch.zeros(len(names), dtype=torch.long, device=rows.device)
    answered.index_add_(0, group, wanted.any(1).long())
    z_sum = log_normaliser.detach().square().sum()
    return LossSums(nll, nll.detach(), z_sum, (answered > 0).sum())
