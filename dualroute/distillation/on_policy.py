"""Batches that the student writes itself, so that it is corrected where it really goes.

GKD (Agarwal et al. 2023, https://arxiv.org/abs/2306.13649, algorithm 1): in a share λ of the steps the
student continues prefixes of the data by sampling, and the divergence from the teacher is taken on its own
tokens; no gradient goes through the sampling.

In: a batch of :mod:`dualroute.data.module`.  Here: of each window the first tokens of its longest document
are kept and continued.  Next: :mod:`~dualroute.distillation.module` trains on that batch with the
divergence alone, for its labels are the student's.

Which steps these are, and what is drawn in them, is a function of seed, step and place
only.  So nothing is saved, and a resumed run draws the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualroute.data.plan import seeded_words
from dualroute.data.reader import IGNORE_INDEX
from dualroute.model import DualRoutingTransformer
from dualroute.model.decoding.generation import continue_batch


def is_on_policy(seed: int, step: int, fraction: float) -> bool:
    """Whether the step that follows ``step`` finished ones is trained on the student's own text."""
    if fraction <= 0:
        return False
    return int(seeded_words(seed, step, "on-policy", count=1)[0]) < fraction * 2.0**64


def own_continuations(
    model: DualRoutingTransformer,
    batch: dict[str, Tensor],
    *,
    prefix: int,
    new_tokens: int,
    temperature: float,
    eos_id: int,
    draw: tuple[int, ...],
) -> dict[str, Tensor]:
    """A batch like ``batch`` whose labels are tokens that ``model`` drew.

    Args:
        model: The student; its parameters are only read.
        batch: ``input_ids`` and ``segment_ids`` (B, n).
        prefix: Tokens of data to begin with; fewer where no document of a window is so long.
        new_tokens: Tokens to draw.
        temperature: Divides the logits.
        eos_id: What ends a text; what was drawn after it does not count.
        draw: Numbers that decide the draw: seed, step, number of the micro-batch.

    Returns:
        ``input_ids``, ``labels`` (`IGNORE_INDEX` in the prefix and past the end), ``segment_ids`` and
        ``positions``, (B, prefix + new_tokens − 1), and ``num_targets``, the labels of this batch alone.
    """
    prompts = document_beginnings(batch["input_ids"], batch["segment_ids"], prefix)
    generator = torch.Generator().manual_seed(int(seeded_words(*draw, "draw", count=1)[0] >> 1))
    with torch.autocast(prompts.device.type, enabled=False):
        texts = continue_batch(model, prompts, new_tokens, generator, temperature)
    inputs, labels = texts[:, :-1], texts[:, 1:].clone()
    drawn = torch.arange(labels.shape[1], device=labels.device) >= prompts.shape[1] - 1  # (n,)
    # an input that is a drawn <eos>, or comes after one, predicts nothing
    ended = ((labels == eos_id) & drawn).cumsum(1) > (labels == eos_id) * drawn
    labels[ended | ~drawn] = IGNORE_INDEX
    return {
        "input_ids": inputs,
        "labels": labels,
        "segment_ids": torch.ones_like(inputs),
        "positions": torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs),
        "num_targets": (labels != IGNORE_INDEX).sum(),
    }


def document_beginnings(input_ids: Tensor, segment_ids: Tensor, length: int) -> Tensor:
    """The first tokens of each window's longest document: (B, n) → (B, m), m ≤ ``length`` for all alike."""
    rows = []
    for ids, segments in zip(input_ids, segment_ids, strict=True):
        sizes = torch.bincount(segments, minlength=2)
        sizes[0] = 0  # padding
        rows.append(ids[segments == sizes.argmax()])
    common = max(1, min(length, *(len(row) for row in rows)))
    return torch.stack([row[:common] for row in rows])
