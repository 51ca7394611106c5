"""The learning rate as a pure function of the step.

In: the settings of a run and what it has counted.  Next: ``build.HyperParameters`` writes it into the
optimizer before each step, so there is no state to save and nothing to drift on resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dualroute.training.config import TrainConfig
from dualroute.training.optim_config import OptimConfig
from dualroute.training.step.token_count import TokenCount


def lr_at(
    step: int, total_steps: int, config: OptimConfig, in_batches: Callable[[int], float] = float
) -> float:
    """Learning rate of the optimizer step that follows ``step`` finished ones.

    Linear warm-up reaches ``lr`` at its last step.  ``min_lr_ratio`` is reached when all ``total_steps``
    are finished, so that the last step still moves even at a ratio of 0.  wsd falls by 1 − √progress
    (Hägele et al. 2024, https://arxiv.org/abs/2405.18392), or along a line.

    Args:
        step: Finished optimizer steps.
        total_steps: Of the whole run.
        config: The course.
        in_batches: What progress is measured in, as a function of the step: steps, or tokens in batches.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    begin, here, end = (in_batches(s) for s in (config.warmup_steps, step, total_steps))
    if config.schedule == "wsd":
        begin = max(begin, end - max(1, round(config.decay_fraction * end)))
    progress = min(max((here - begin) / max(end - begin, 1), 0.0), 1.0)
    if config.schedule == "cosine":
        shape = (1 + math.cos(math.pi * progress)) / 2
    else:
        shape = 1 - (math.sqrt(progress) if config.decay_shape == "sqrt" else progress)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)


def learning_rate(step: int, train: TrainConfig, config: OptimConfig, count: TokenCount) -> float:
    """:func:`lr_at` in a run whose length is given in steps, or in tokens."""
    by_tokens = train.max_tokens is not None
    return lr_at(step, count.total_steps(train), config, count.in_batches if by_tokens else float)
