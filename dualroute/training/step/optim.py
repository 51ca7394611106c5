"""What turns gradients into a step: parameter groups, AdamW, and the learning rate's course.

The LightningModule's ``configure_optimizers`` calls :func:`build_optimizer`; before each step it writes
:func:`learning_rate` and the other settings (:class:`HyperParameters`) into the optimizer.

Under ZeRO-3 a parameter's own shape is empty, its real one stands in ``ds_shape``.
Whoever decides by ``param.ndim`` what is decayed would then decay nothing at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dualroute import compat
from dualroute.errors import UserError
from dualroute.training.config import OptimConfig, TrainConfig
from dualroute.training.finetuning.depth import DepthCourse
from dualroute.training.step.token_count import TokenCount


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    decay_embeddings: bool = False,
    unit_of: Callable[[str], int] | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters of ``model``, those with and those without weight decay.

    Matrices decay; norms and biases (anything with fewer than two axes) do not, nor do the attention's gates
    (parameters named ``gate…``), nor embeddings unless asked.  A tied output weight is the embedding, and
    counted once.

    Args:
        model: Whose parameters.
        weight_decay: Of those that decay.
        decay_embeddings: The embedding does.
        unit_of: By name, which parameters are stepped alike (``training/finetuning/depth.py``); null: all.

    Returns:
        One or two AdamW groups of each unit (an empty one is left out), in the order of
        ``model.parameters()``; each has its ``unit`` where there are several.

    Raises:
        ValueError: Nothing in ``model`` is trainable.
    """
    embeddings = {
        id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }
    found: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        axes = len(getattr(parameter, "ds_shape", parameter.shape))
        is_gate = name.rpartition(".")[2].startswith("gate")  # not the weight of a layer called gate
        decays = axes >= 2 and not is_gate and (decay_embeddings or id(parameter) not in embeddings)
        found.setdefault((0 if unit_of is None else unit_of(name), not decays), []).append(parameter)
    if not found:
        raise ValueError("the model has no trainable parameter: unfreeze some before building the optimizer")
    return [
        {"params": found[key], "weight_decay": 0.0 if key[1] else weight_decay}
        | ({} if unit_of is None else {"unit": key[0]})
        for key in sorted(found)
    ]


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    *,
    offload: bool = False,
    unit_of: Callable[[str], int] | None = None,
) -> torch.optim.Optimizer:
    """AdamW over :func:`parameter_groups`; fused where ``config.fused`` says so, or is null on CUDA.

    Args:
        model: Already on its device, or partitioned by ZeRO-3.
        config: Peak learning rate, betas, eps, weight decay.
        offload: Use DeepSpeed's CPU Adam, for optimizer states that ZeRO keeps in the host's memory.
        unit_of: See :func:`parameter_groups`.

    Raises:
        UserError: ``offload`` without DeepSpeed installed.
    """
    groups = parameter_groups(
        model, config.weight_decay, decay_embeddings=config.decay_embeddings, unit_of=unit_of
    )
    if not offload:
        fused = torch.cuda.is_available() if config.fused is None else config.fused
        optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, **({"fused": True} if fused else {})
        )
        if fused:
            compat.optimizer_leaves_scaling_to_others(optimizer)
        return optimizer
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError as error:
        raise UserError(
            "optimizer offload needs DeepSpeed, which is not installed: pip install -e '.[deepspeed]'"
        ) from error
    return DeepSpeedCPUAdam(groups, lr=config.lr, betas=config.betas, eps=config.eps, adamw_mode=True)


def lr_at(
    step: int, total_steps: int, config: OptimConfig, in_batches: Callable[[int], float] = float
) -> float:
    """Learning rate of the optimizer step that follows ``step`` finished ones.

    Linear warm-up reaches ``lr`` at its last step.  ``min_lr_ratio`` is reached when all ``total_steps``
    are finished, so that the last step still moves even at a ratio of 0.  wsd falls by 1 − √progress
    (Hägele et al. 2024, https://arxiv.org/abs/2405.18392).

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
    shape = 1 - math.sqrt(progress) if config.schedule == "wsd" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)


def learning_rate(step: int, train: TrainConfig, config: OptimConfig, count: TokenCount) -> float:
    """:func:`lr_at` in a run whose length is given in steps, or in tokens."""
    by_tokens = train.max_tokens is not None
    return lr_at(step, count.total_steps(train), config, count.in_batches if by_tokens else float)


class HyperParameters:
    """Settings of AdamW as the configuration has them, whatever a restored state says.

    Lightning and DeepSpeed restore the parameter groups of the optimizer together with its moments, and with
    them the weight decay, betas and eps of the run that saved them, and whether its steps were fused.

    Args:
        optimizer: As it was built, before a state is loaded into it.
        config: What is to hold.

    Attributes:
        units: Of each group (``training/finetuning/depth.py``).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimConfig) -> None:
        self._weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
        self.units = [group.get("unit") for group in optimizer.param_groups]
        self._config = config
        self._fused = [group.get("fused") for group in optimizer.param_groups]
        self._state_is_placed = False

    def write(
        self, optimizer: torch.optim.Optimizer, lr: float, course: DepthCourse | None = None, step: int = 0
    ) -> None:
        """Write them, and ``lr``, into the groups of ``optimizer``.

        Args:
            optimizer: The one that is about to step.
            lr: Of the step.
            course: How groups of different units are stepped; null: all alike.
            step: Finished steps.
        """
        (first, second), eps = self._config.betas, self._config.eps
        betas = (first, second)
        for group, weight_decay, fused, unit in zip(
            optimizer.param_groups, self._weight_decays, self._fused, self.units, strict=True
        ):
            group.update(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)
            if course is not None and unit is not None:
                group.update(course.settings(unit, step, lr, eps, weight_decay, betas))
            if "fused" in group:
                group["fused"] = fused
        if not self._state_is_placed and any(self._fused):
            place_counts(optimizer)
            self._state_is_placed = True


def place_counts(optimizer: torch.optim.Optimizer) -> None:
    """Each parameter's count of steps beside it: a fused step reads it there, any other on the host.

    A state that was saved by a step of the other kind brings it back where that one had it.
    """
    for parameter, state in optimizer.state.items():
        count = state.get("step") if isinstance(state, dict) else None
        if torch.is_tensor(count) and torch.is_tensor(parameter):
            state["step"] = count.to(device=parameter.device, dtype=torch.float32)
