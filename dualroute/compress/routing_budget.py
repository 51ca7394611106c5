"""What each layer has to read, under a budget of keys.

In: a dense model, texts, the KV groups of each layer by how near they look, and the share of its keys that a
token may read.  Here: every layer begins with the same routes, window and ``top_k``; then what costs least
divergence from the dense model for each key that it saves is given up, one thing at a time: half of a layer's
window, half of its ``top_k``, or its global route.  Out: the shape of a dual model, layer by layer.  A model
that is dual already begins as it is, and keeps its routes.

What is measured is KL(model ‖ smaller) of the next token, which is 0 where nothing is missed, and not the
loss of the text, whose differences are noise at this size.  A cost is measured anew before it is paid, since
what went before has changed it; those that are behind it in the line are not (lazy greedy, Minoux 1978).
"""

from __future__ import annotations

import copy
import dataclasses
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.compress.calibration import Batch
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.conversion import divide_heads
from dualroute.model.cost.flops import keys_read

SMALLEST_WINDOW = 8
_LOGIT_ROWS = 1024  # tokens whose logits exist at once


@dataclass(frozen=True, order=True)
class LayerShape:
    """What one layer reads.

    Attributes:
        window: Keys of the local route.
        top_k: Blocks of the global route.
        far: Whether it has one; without, all heads are local.
    """

    window: int
    top_k: int
    far: bool = True


@dataclass(frozen=True)
class Budgeted:
    """A shape within the budget.

    Attributes:
        config: Of the dual model.
        divergence: KL from the model that it was made of, nats a token, before any healing.
        share: Of that model's keys that a token reads.
    """

    config: ModelConfig
    divergence: float
    share: float


def share_of_keys(config: ModelConfig, context: int) -> float:
    """Keys that a token of ``context`` tokens reads, over all layers and heads, against dense attention."""
    dense = config.num_layers * config.num_heads * (context + 1) / 2
    return sum(sum(keys_read(config.of_layer(i), context)) for i in range(config.num_layers)) / dense


class KeySearch:
    """The search under a budget; :meth:`within` gives its result.

    Args:
        model: The dense model, or, without ``shape``, a dual one.
        batches: ``input_ids`` and, where rows hold several documents, ``segment_ids``.
        context: Tokens of a text, by which keys are counted.
        device: Where to measure.
        shape: Of the dual model that everything begins with: window and top_k are the largest.
        local_groups: KV groups that become local in each layer that keeps its global route.

    Attributes:
        dual: The model with the shape as it is now.
    """

    def __init__(
        self,
        model: DualRoutingTransformer,
        batches: Sequence[Batch],
        context: int,
        device: torch.device,
        *,
        shape: ModelConfig | None = None,
        local_groups: Sequence[Sequence[int]] = (),
    ) -> None:
        self.context, self.device, self.batches = context, device, batches
        self._near: list[Any] = []  # attentions without a global route, where one may be given up
        if shape is None:
            self.shape, self.dual = model.config.resolved(), copy.deepcopy(model)
            of_layers = [self.shape.of_layer(index) for index in range(self.shape.num_layers)]
            self.layers = [LayerShape(one.window, one.top_k, one.global_heads != 0) for one in of_layers]
            self._whole = share_of_keys(self.shape, context)
        else:
            self.shape, self._whole = shape.resolved(), 1.0
            self.dual = divide_heads(model.cpu(), shape, local_groups).to(device)
            only_local = dataclasses.replace(shape, attention="local", global_heads=None, local_heads=None)
            every = [range(shape.num_kv_heads or 1)] * shape.num_layers
            local = divide_heads(model, only_local, every).to(device)
            self._near = [layer.attention for layer in local.layers]
            self.layers = [LayerShape(shape.window, shape.top_k) for _ in self._near]
        self.teacher = model.to(device)
        self._far: list[Any] = [layer.attention for layer in self.dual.layers]
        self._wanted = [self._states(self.teacher, batch) for batch in batches]

    def within(self, share: float) -> Budgeted:
        """The shape that reads at most this share of the model's keys.

        Raises:
            UserError: No shape of these blocks reads as little.
        """
        divergence = self.divergence()
        gains: list[tuple[float, int, LayerShape, int]] = []
        taken = 0  # steps so far: what was measured before the last one is stale
        for layer in range(len(self.layers)):
            for step in self._steps(layer):
                heapq.heappush(gains, (-math.inf, layer, step, -1))  # not measured yet: first in the line
        while (now := self._share()) > share:
            best = None
            while gains:
                cost, layer, step, measured = heapq.heappop(gains)
                if step not in self._steps(layer):
                    continue  # the layer has changed: its steps are others
                if measured == taken:
                    best = cost, layer, step
                    break
                heapq.heappush(gains, (*self._cost(layer, step, divergence, now), taken))
            if best is None:
                others = "a smaller --block, more --local_heads, or " if self._near else ""
                raise UserError(
                    f"--keys {share:g}: with blocks of {self.shape.block} and {self.shape.global_heads} "
                    f"global heads a token reads at least {now:.3f} of the keys of {self.context} tokens: "
                    f"give {others}a larger --keys"
                )
            _, layer, step = best
            self._set(layer, step)
            taken += 1
            divergence = self.divergence()
            for following in self._steps(layer):
                heapq.heappush(gains, (-math.inf, layer, following, -1))
        return Budgeted(self.config(), divergence, now)

    def _share(self) -> float:
        return share_of_keys(self.config(), self.context) / self._whole

    def config(self) -> ModelConfig:
        """The shape as it is now."""
        far = [number for number, layer in enumerate(self.layers) if layer.far]
        return dataclasses.replace(
            self.shape,
            global_layers=None if len(far) == len(self.layers) else far,
            layer_windows=[layer.window for layer in self.layers],
            layer_top_k=[layer.top_k for layer in self.layers],
        )

    @torch.no_grad()
    def divergence(self) -> float:
        """KL(model ‖ smaller) of the next token, nats, as the layers are now."""
        total, count = 0.0, 0
        for batch, wanted in zip(self.batches, self._wanted, strict=True):
            ours = self._states(self.dual, batch)
            for theirs_part, ours_part in zip(
                wanted.split(_LOGIT_ROWS), ours.split(_LOGIT_ROWS), strict=True
            ):
                theirs = self.teacher.head(theirs_part).float().log_softmax(-1)
                guess = self.dual.head(ours_part).float().log_softmax(-1)
                total += float(F.kl_div(guess, theirs, reduction="sum", log_target=True))
            count += len(ours)
        return total / max(count, 1)

    @torch.no_grad()
    def _states(self, model: DualRoutingTransformer, batch: Batch) -> Tensor:
        """(tokens, dim) of all tokens that are not padding."""
        segments = batch.get("segment_ids")
        segments = None if segments is None else segments.to(self.device)
        states = model.hidden_states(batch["input_ids"].to(self.device), segment_ids=segments).flatten(0, 1)
        return states if segments is None else states[segments.flatten() != 0]

    def _steps(self, layer: int) -> list[LayerShape]:
        """What the layer could give up next."""
        now = self.layers[layer]
        steps = []
        if now.window // 2 >= SMALLEST_WINDOW and self._far[layer].local_heads:
            steps.append(dataclasses.replace(now, window=now.window // 2))
        if now.far and now.top_k and self.shape.share_choice == 1:  # else it is that of several layers
            steps.append(dataclasses.replace(now, top_k=now.top_k // 2))
        if self._near and now.far and sum(other.far for other in self.layers) > 1:
            steps.append(dataclasses.replace(now, far=False))
        return steps

    def _cost(
        self, layer: int, step: LayerShape, divergence: float, share: float
    ) -> tuple[float, int, LayerShape]:
        """Divergence for each share of the keys that a step saves."""
        before = self.layers[layer]
        self._set(layer, step)
        saved = share - self._share()
        cost = (self.divergence() - divergence) / saved if saved > 0 else math.inf
        self._set(layer, before)
        return cost, layer, step

    def _set(self, layer: int, shape: LayerShape) -> None:
        attention = self._near[layer] if self._near and not shape.far else self._far[layer]
        attention.window = shape.window
        if shape.far:
            attention.routing = dataclasses.replace(attention.routing, top_k=shape.top_k)
        self.dual.layers[layer].attention = attention
        self.layers[layer] = shape
