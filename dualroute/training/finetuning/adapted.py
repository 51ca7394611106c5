"""Layers that have a low-rank adapter: which ones these are, and the weight that both make together.

In: a layer of ``peft``, whose ``base_layer`` has the weight W that stays, and whose matrices A and B are
trained.  Here: :func:`adapted_weight` is W + alpha / rank · B A, with dora each row of it brought to its own
trained length.  Next: what needs the weight itself takes it from here: the head, which lends it to a loss, a
forward pass that rounds it, and whoever publishes the model.  All other layers add two products of their own
and never make it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "default"  #: peft's, of the one adapter of a layer
HEAD = "head"  #: of a model
_BASE = ".base_layer"


def is_adapted(module: nn.Module) -> bool:
    """Whether ``module`` is a layer with an adapter."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return ".lora_" in name


def is_base_layer(name: str) -> bool:
    """Whether a module of this name is one beneath an adapter."""
    return name.endswith(_BASE)


def own_name(name: str) -> str:
    """The name that a parameter, or a layer, beneath an adapter has in the model without."""
    return name.replace(f"{_BASE}.", ".").removesuffix(_BASE)


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers with adapters, by name."""
    return {name: module for name, module in model.named_modules() if is_adapted(module)}


def adapted_weight(layer: Any) -> Tensor:
    """(N, K) weight of a linear layer with its adapter added.

    In the precision of the parameters, inside autocast too.  Gradients go to the adapter; the norm of dora's
    rows counts as a constant (Liu et al. 2024, §4.3).

    Args:
        layer: See :func:`is_adapted`.
    """
    base: Tensor = layer.get_base_layer().weight
    with torch.autocast(base.device.type, enabled=False):
        weight: Tensor = base + layer.get_delta_weight(NAME)
        if not layer.use_dora[NAME]:
            return weight
        length = layer.lora_magnitude_vector[NAME].weight
        return weight * (length / weight.norm(dim=1).detach()).unsqueeze(1)


def _row_scale(layer: Any) -> Tensor:
    """(N,) factor that brings the rows of a dora layer to their trained lengths."""
    base: Tensor = layer.get_base_layer().weight
    with torch.no_grad(), torch.autocast(base.device.type, enabled=False):
        norm = (base + layer.get_delta_weight(NAME)).norm(dim=1)
    scale: Tensor = layer.lora_magnitude_vector[NAME].weight / norm
    return scale


def own_forward(model: nn.Module, *, dora: bool) -> None:
    """Give the adapted layers of ``model`` the forward passes that they have here: the head its lending, and
    those of dora one that multiplies no unit matrix and compiles."""
    for name, layer in adapted_layers(model).items():
        if name == HEAD:
            layer.__class__ = _adapted_head()
        elif dora:
            layer.__class__ = _dora_linear()


@cache
def _adapted_head() -> type[Any]:
    from peft.tuners.lora import Linear

    class AdaptedHead(Linear):
        """A head that lends its weight with the adapter added."""

        def forward(self, hidden_states: Tensor, project: Callable[[Tensor, Tensor], Any] = F.linear) -> Any:
            """As :class:`~dualroute.model.lm_head.NextTokenHead`."""
            return project(hidden_states, adapted_weight(self))

    return AdaptedHead


@cache
def _dora_linear() -> type[Any]:
    from peft.tuners.lora import Linear

    class DoraLinear(Linear):
        """peft's arithmetic: what is dropped, is dropped from all that the adapter adds."""

        def forward(self, hidden_states: Tensor) -> Tensor:
            """(…, K) → (…, N)."""
            base, drop = self.get_base_layer(), self.lora_dropout[NAME]
            result: Tensor = self.base_layer(hidden_states)
            if isinstance(drop, nn.Identity) or not self.training:
                of_base = result if base.bias is None else result - base.bias
            else:
                hidden_states = drop(hidden_states)
                of_base = F.linear(hidden_states, base.weight)
            scale = _row_scale(self)
            thin = self.lora_B[NAME](self.lora_A[NAME](hidden_states)) * self.scaling[NAME]
            return (result + (scale - 1) * of_base + scale * thin).to(result.dtype)

    return DoraLinear


def round_adapted(layer: Any, rounded: Callable[[Tensor], Tensor], *, is_head: bool) -> None:
    """Have a layer multiply with ``rounded`` of its :func:`adapted_weight` from now on."""

    class RoundedAdapted(type(layer)):  # type: ignore[misc]
        """A layer that rounds its weight, the adapter added, in each forward pass."""

        def forward(self, hidden_states: Tensor, project: Callable[[Tensor, Tensor], Any] = F.linear) -> Any:
            """(…, K) → (…, N), or of the head what ``project`` makes."""
            weight = rounded(adapted_weight(self))
            return (
                project(hidden_states, weight)
                if is_head
                else F.linear(hidden_states, weight, self.get_base_layer().bias)
            )

    layer.__class__ = RoundedAdapted
