"""Layers by their depth: which are trained yet, and how fast.

In: names of parameters and the number of a step.  Here: pure functions of both.  A *unit* is what is unfrozen
together: 0 are the heads and the last norm, 1 the layer at the top, L that at the bottom, L + 1 the embedding
or what else enters (a tied embedding that also is the output belongs to 0).  Next:
``training/step/optim/build.py`` writes the settings of each unit's groups before each step.

A unit that is not trained yet has gradients of zero, so its moments stay zero, whatever divides the optimizer
among ranks; all parameters are in it from the start.  Adam corrects its moments by its own count of steps,
which is too high for a unit that begins later.  :func:`correction` undoes this in the learning rate and eps,
so that each unit's steps are those of an Adam that began with it, and a saved state needs nothing besides.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dualroute.model.config import ModelConfig
from dualroute.training.finetuning.config import StrategyConfig

log = logging.getLogger(__name__)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_BOTTOM = re.compile(r"(?:^|\.)(?:embedding|frontend)\.")


def unit_of(name: str, num_layers: int, *, embedding_is_head: bool) -> int:
    """The unit that the parameter ``name`` belongs to."""
    layer = _LAYER.search(name)
    if layer is not None:
        return num_layers - int(layer[1])
    if _BOTTOM.search(name) is not None:
        return 0 if embedding_is_head else num_layers + 1
    return 0


def correction(step: int, begin: int, betas: tuple[float, float]) -> tuple[float, float]:
    """Factors of learning rate and eps that make an Adam which counts from 0 one that counts from ``begin``.

    With t steps counted and k since ``begin``, m / (1 - b1^k) / (√(v / (1 - b2^k)) + eps) is wanted and
    m / (1 - b1^t) / (√(v / (1 - b2^t)) + eps') is what is computed.

    Args:
        step: Finished steps before this one.
        begin: Of those, the ones before the unit's first.
        betas: Adam's.
    """
    if begin == 0:
        return 1.0, 1.0
    counted, own = step + 1, step + 1 - begin
    first, second = ((1 - beta**own) / (1 - beta**counted) for beta in betas)
    return math.sqrt(second) / first, math.sqrt(second)


@dataclass(frozen=True)
class DepthCourse:
    """How the units of a run are stepped.

    Attributes:
        config: Shares and decay.
        num_layers: L.
        total_steps: Of the run.
        embedding_is_head: See :func:`unit_of`.
    """

    config: StrategyConfig
    num_layers: int
    total_steps: int
    embedding_is_head: bool

    def unit(self, name: str) -> int:
        """Of a parameter."""
        return unit_of(name, self.num_layers, embedding_is_head=self.embedding_is_head)

    def begin(self, unit: int) -> int:
        """Finished steps after which ``unit`` is trained."""
        return math.ceil(self.config.unfreeze_share * self.total_steps * unit / (self.num_layers + 1))

    def is_trained(self, unit: int, step: int) -> bool:
        """In the step that follows ``step`` finished ones."""
        return step >= self.begin(unit)

    def layers_trained(self, step: int) -> int:
        """How many layers, from the top."""
        return sum(self.is_trained(unit, step) for unit in range(1, self.num_layers + 1))

    def factor(self, unit: int) -> float:
        """Learning rate of ``unit`` as a share of the heads'."""
        return float(self.config.layer_lr_decay**unit)

    def settings(
        self,
        unit: int,
        step: int,
        lr: float,
        eps: float,
        weight_decay: float,
        betas: tuple[float, float] | None,
    ) -> dict[str, Any]:
        """lr, eps and weight_decay of a group of ``unit`` in the step that follows ``step`` finished ones.

        Null ``betas`` are Muon's: the length of its mean does not matter, so there is nothing to correct.
        """
        if not self.is_trained(unit, step):
            return {"lr": 0.0, "eps": eps, "weight_decay": weight_decay}
        of_rate, of_eps = (1.0, 1.0) if betas is None else correction(step, self.begin(unit), betas)
        # decay is the product of both, and is to be that of the learning rate without the correction
        return {
            "lr": lr * self.factor(unit) * of_rate,
            "eps": eps * of_eps,
            "weight_decay": weight_decay / of_rate,
        }

    def figures(self, step: int, lr: float) -> dict[str, float]:
        """What the log says of the step that followed ``step`` finished ones; ``lr`` is the heads'."""
        lowest = max(unit for unit in range(self.num_layers + 2) if self.is_trained(unit, step))
        return {
            "optim/lr_lowest": lr * self.factor(lowest),
            "finetune/layers_trained": float(self.layers_trained(step)),
        }

    def tell_unfrozen(self, step: int, units: Container[int | None]) -> None:
        """Log which of ``units`` are trained from this step on, and were not before."""
        for unit in range(1, self.num_layers + 2) if self.config.unfreeze_share else ():
            if self.begin(unit) == step and unit in units:
                what = "embedding" if unit > self.num_layers else f"layers.{self.num_layers - unit}"
                log.info("%s", f"step {step + 1}: {what} is trained from here on")

    def hold_back(self, module: nn.Module, steps_done: Callable[[], int]) -> None:
        """Have the gradients of units that are not trained yet be zero, in every backward pass."""
        if not self.config.unfreeze_share:
            return
        for name, parameter in module.named_parameters():
            unit = self.unit(name)
            if unit and parameter.requires_grad:
                parameter.register_hook(_zero_before(self, unit, steps_done))


def _zero_before(
    course: DepthCourse, unit: int, steps_done: Callable[[], int]
) -> Callable[[Tensor], Tensor | None]:
    def hook(gradient: Tensor) -> Tensor | None:
        return None if course.is_trained(unit, steps_done()) else gradient.new_zeros(gradient.shape)

    return hook


def course_of(config: StrategyConfig, model: ModelConfig, total_steps: int) -> DepthCourse | None:
    """The course of a run; null where all layers are stepped alike.

    The embedding of a model that is tied is its output too, unless a task's head is.
    """
    if not config.by_depth:
        return None
    is_head = model.tie_embeddings and model.task_head is None
    return DepthCourse(config, model.num_layers, total_steps, is_head)
