"""How an export is compared with the model it came from.

In: the model, before anything is published.  Out: inputs that reach every route, the logits that are right
    for them, and figures of how far another's are off.

A router chooses blocks by comparing sums, so two exact programs that add in another
order may choose differently where two blocks score alike to the last digit.  `Difference` therefore tells the
largest error and how many positions are beyond the tolerance, and the tests of the routes use float64, where
it does not happen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.ends_config import TaskHeadConfig

#: Positions of a text whose logits are compared, and how many numbers these may be.
POSITIONS, MAX_LOGITS = 256, 1 << 24


def lengths(config: ModelConfig) -> list[int]:
    """Lengths of text, in tokens, that reach every path: one token, part of a block, some blocks, routing."""
    top_k = max([config.top_k, *(config.layer_top_k or [])])
    routed = (top_k + 3) * config.block + config.block // 2 + 1
    wanted = [1, 5, config.block, config.block + 1, routed]
    if config.global_mode == "auto" and config.attention != "local":
        wanted.append(max(config.auto_break_even + config.block // 2 + 1, routed))
    else:
        wanted.append(2 * routed)
    return sorted({min(length, config.max_context) for length in wanted})


def trial_ids(config: ModelConfig, length: int, batch: int = 2, seed: int = 0) -> Tensor:
    """Random token ids (batch, length)."""
    assert config.vocab_size is not None
    generator = torch.Generator().manual_seed(seed + length)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def positions(config: ModelConfig, length: int) -> Tensor:
    """Some places of a text, all where that is few numbers; evenly spaced, the last one among them."""
    assert config.vocab_size is not None
    count = min(length, POSITIONS, max(16, MAX_LOGITS // config.vocab_size))
    return length - 1 - torch.linspace(0, length - 1, count, dtype=torch.float64).round().long().flip(0)


def place_of_output(head: TaskHeadConfig | None) -> int | None:
    """The token that a text's one output stands at, 0 or -1; null for heads with an output at each token."""
    if head is None or head.kind not in ("sequence", "number", "item"):
        return None
    return 0 if head.pooling == "first" and head.kind != "item" else -1  # the mean stands at each token


@torch.no_grad()
def right_logits(model: DualRoutingTransformer, ids: Tensor, places: Tensor) -> Tensor:
    """What leaves the model itself at these places, (B, places, V or outputs of a task)."""
    hidden = model.hidden_states(ids)
    if model.task_head is None:
        return model.head(hidden[:, places])
    outputs: Tensor = model.task_head(hidden)
    return outputs[:, places]


def trials(model: DualRoutingTransformer) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(ids, positions, logits) of every length; one position where a text has one output."""
    place = place_of_output(model.config.task_head)
    for length in lengths(model.config):
        ids, places = trial_ids(model.config, length), positions(model.config, length)
        if place is not None:
            places = torch.tensor([place % length])
        yield ids, places, right_logits(model, ids, places)


def at_places(outputs: Tensor, places: Tensor) -> Tensor:
    """An export's outputs at the places of a trial: they are these already where a text has one output."""
    return outputs[:, None] if outputs.ndim == 2 else outputs[:, places]


@dataclass(frozen=True)
class Difference:
    """How far logits (…, V) are from the right ones."""

    largest: float
    beyond: float  # share of positions with an error above the tolerance
    same_choice: float  # share of positions where the most likely token is the same

    @classmethod
    def between(cls, got: Tensor, right: Tensor, tolerance: float) -> Difference:
        error = (got.double() - right.double()).abs().amax(-1)
        same = got.argmax(-1) == right.argmax(-1)
        return cls(
            float(error.max()), float((error > tolerance).double().mean()), float(same.double().mean())
        )
