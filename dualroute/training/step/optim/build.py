"""The optimizer of a run, and its settings as the configuration has them before each step.

In: groups of parameters (``groups.py``).  Here: AdamW over them, or Muon and AdamW, in one optimizer.  Next:
the Trainer, or DeepSpeed, steps it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dualroute import compat
from dualroute.errors import UserError
from dualroute.training.finetuning.depth import DepthCourse
from dualroute.training.optim_config import OptimConfig
from dualroute.training.step.optim.groups import groups_of, matrices_of, width_of
from dualroute.training.step.optim.muon import MuonWithAdamW


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    *,
    offload: bool = False,
    unit_of: Callable[[str], int] | None = None,
) -> torch.optim.Optimizer:
    """AdamW over :func:`groups_of`, and Muon over the layers' matrices where ``config.name`` says so.

    AdamW is fused where ``config.fused`` says so, or is null on CUDA.

    Args:
        model: Already on its device, or partitioned by ZeRO-3.
        config: Peak learning rates, betas, eps, weight decay.
        offload: Use DeepSpeed's CPU Adam, for optimizer states that ZeRO keeps in the host's memory.
        unit_of: See :func:`parameter_groups`.

    Raises:
        UserError: ``offload`` without DeepSpeed installed.
    """
    groups = groups_of(model, config, unit_of)
    matrices = _share_of_matrices(config, model)
    for group in groups:
        group.update(_peak(group, config, matrices))
    if offload:
        return _cpu_adam(groups, config)
    fused = torch.cuda.is_available() if config.fused is None else config.fused

    def adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, **({"fused": True} if fused else {})
        )

    optimizer: torch.optim.Optimizer
    if config.name == "muon":
        optimizer = MuonWithAdamW(groups, adamw, matrices_of(model), config.muon.precision)
    else:
        optimizer = adamw(groups)
    if fused:
        compat.optimizer_leaves_scaling_to_others(optimizer)
    return optimizer


def _cpu_adam(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError as error:
        raise UserError(
            "optimizer offload needs DeepSpeed, which is not installed: pip install -e '.[deepspeed]'"
        ) from error
    return DeepSpeedCPUAdam(groups, lr=config.lr, betas=config.betas, eps=config.eps, adamw_mode=True)


def _share_of_matrices(config: OptimConfig, model: nn.Module) -> float:
    """What the rate of the layers' matrices is multiplied by, for a model of this width."""
    if config.base_dim is None or (config.name == "muon" and config.muon.scale == "original"):
        return 1.0
    narrower = config.base_dim / width_of(model)
    return float(narrower**0.5 if config.name == "muon" else narrower)


def _peak(group: dict[str, Any], config: OptimConfig, matrices: float) -> dict[str, Any]:
    """Settings of a group whose kind has some of its own; ``matrices`` of :func:`_share_of_matrices`."""
    kind, muon = group.get("kind"), config.muon
    if kind == "muon":
        decay = config.weight_decay if muon.weight_decay is None else muon.weight_decay
        return {"lr": (muon.lr or config.lr) * matrices, "weight_decay": decay, **_of_muon(config)}
    own = {"embedding": config.embedding_lr, "head": config.head_lr, "matrices": config.lr * matrices}.get(
        str(kind)
    )
    return {"lr": own or config.lr}


def _of_muon(config: OptimConfig) -> dict[str, Any]:
    muon = config.muon
    return {
        "momentum": muon.momentum,
        "nesterov": muon.nesterov,
        "ns_steps": muon.steps,
        "scale": muon.scale,
    }


class HyperParameters:
    """Settings of the optimizer as the configuration has them, whatever a restored state says.

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
        # of the rate of the run, which is that of its AdamW
        self._shares = [group["lr"] / config.lr for group in optimizer.param_groups]
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
        for group, weight_decay, fused, unit, share in zip(
            optimizer.param_groups, self._weight_decays, self._fused, self.units, self._shares, strict=True
        ):
            rate, is_muon = lr * share, group.get("kind") == "muon"
            group.update(lr=rate, weight_decay=weight_decay)
            group.update(_of_muon(self._config) if is_muon else {"betas": betas, "eps": eps})
            if course is not None and unit is not None:
                of_unit = course.settings(unit, step, rate, eps, weight_decay, None if is_muon else betas)
                group.update({key: of_unit[key] for key in of_unit if key in group})
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
