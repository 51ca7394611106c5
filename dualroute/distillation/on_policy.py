"""Batches that the student writes itself, so that it is corrected where it really goes.

GKD (Agarwal et al. 2023, https://arxiv.org/abs/2306.13649, algorithm 1): in a share λ of the steps the
student continues prefixes of the data by sampling, and the divergence from the teacher is taken on its own
tokens; no gradient goes through the sampling.

In: a batch of :mod:`dualroute.data.module`, to which the loader has added the first tokens of the longest
document of each window (:class:`Prompts`).  Here: they are continued.  Next:
:mod:`~dualroute.distillation.module` trains on that batch with the divergence alone, for its labels are the
student's.

Which steps these are, and what is drawn in them, is a function of seed, step and place
only.  So nothing is saved, and a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualroute.attention.core.layout import LayoutPlan
from dualroute.data.plan import seeded_words
from dualroute.data.reader import IGNORE_INDEX, label_rows
from dualroute.model import DualRoutingTransformer
from dualroute.model.decoding.generation import continue_batch


def is_on_policy(seed: int, step: int, fraction: float) -> bool:
    """Whether the step that follows ``step`` finished ones is trained on the student's own text."""
    if fraction <= 0:
        return False
    return int(seeded_words(seed, step, "on-policy", count=1)[0]) < fraction * 2.0**64


@dataclass(frozen=True)
class Prompts:
    """An addition to batches, made where they are loaded: ``prompts``, see :func:`document_beginnings`."""

    length: int

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompts": document_beginnings(batch["input_ids"], batch["segment_ids"], self.length)}


def own_continuations(
    model: DualRoutingTransformer,
    batch: dict[str, Any],
    *,
    new_tokens: int,
    temperature: float,
    eos_id: int,
    draw: tuple[int, ...],
    layouts: Mapping[str, LayoutPlan] | None = None,
) -> dict[str, Any]:
    """A batch like ``batch`` whose labels are tokens that ``model`` drew.

    Args:
        model: The student; its parameters are only read.
        batch: With ``prompts`` (B, m), as :class:`Prompts` made them.
        new_tokens: Tokens to draw.
        temperature: Divides the logits.
        eos_id: What ends a text; what was drawn after it does not count.
        draw: Numbers that decide the draw: seed, step, number of the micro-batch.
        layouts: What to lay out of the new batch, by key.

    Returns:
        ``input_ids``, ``labels`` (`IGNORE_INDEX` in the prefix and past the end), ``segment_ids`` and
        ``positions``, (B, m + new_tokens − 1), the ``layouts``; on the host ``num_targets``, the labels of
        this batch alone; and ``label_rows``, as a loader makes them.
    """
    prompts: Tensor = batch["prompts"]
    device = prompts.device
    generator = torch.Generator(device).manual_seed(int(seeded_words(*draw, "draw", count=1)[0] >> 1))
    with torch.autocast(device.type, enabled=False):
        texts = continue_batch(model, prompts, new_tokens, generator, temperature)
    inputs, following = texts[:, :-1], texts[:, 1:]
    drawn = torch.arange(following.shape[1], device=device) >= prompts.shape[1] - 1  # (n,)
    # an input that is a drawn <eos>, or comes after one, predicts nothing
    ended = ((following == eos_id) & drawn).cumsum(1) > (following == eos_id) * drawn
    labels = following.masked_fill(ended | ~drawn, IGNORE_INDEX)
    on_host = drawn_labels(labels)
    group = model.sequence_group
    rows = label_rows(on_host, (0, 1) if group is None else (group.rank(), group.size()))
    segments = torch.ones(inputs.shape, dtype=torch.int64)  # each row is one document: the host knows that
    return {
        "input_ids": inputs,
        "labels": labels,
        "segment_ids": torch.ones_like(inputs),
        "positions": torch.arange(inputs.shape[1], device=device).expand_as(inputs),
        "num_targets": int(np.count_nonzero(on_host != IGNORE_INDEX)),
        "label_rows": rows.to(device, non_blocking=True),
        **{name: plan.build(segments).to(device) for name, plan in (layouts or {}).items()},
    }


def drawn_labels(labels: Tensor) -> NDArray[Any]:
    """Labels (B, n) on the host: the one read-back of a generated batch, for how many there are and where
    depends on where the student ended its texts."""
    return labels.cpu().numpy()


def document_beginnings(input_ids: Tensor, segment_ids: Tensor, length: int) -> Tensor:
    """The first tokens of each window's longest document: (B, n) → (B, m), m ≤ ``length`` for all alike."""
    rows = []
    for ids, segments in zip(input_ids, segment_ids, strict=True):
        sizes = torch.bincount(segments, minlength=2)
        sizes[0] = 0  # padding
        rows.append(ids[segments == sizes.argmax()])
    common = max(1, min(length, *(len(row) for row in rows)))
    return torch.stack([row[:common] for row in rows])
