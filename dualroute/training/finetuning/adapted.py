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
from typing import Any, NamedTuple

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
    """(N, K) weight of a linear layer with its adapter added; all of its parameters are whole.

    Args:
        layer: See :func:`is_adapted`.
    """
    lengths = layer.lora_magnitude_vector[NAME].weight if layer.use_dora[NAME] else None
    down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    return _Adapter(down, up, lengths, layer.scaling[NAME]).on(layer.get_base_layer().weight)


class _Adapter(NamedTuple):
    """What is trained beside a weight (N, K).

    Attributes:
        down: (r, K).
        up: (N, r).
        lengths: (N,) of the rows of the sum; null leaves them as they are.
        scaling: alpha / r.
    """

    down: Tensor
    up: Tensor
    lengths: Tensor | None
    scaling: float

    def on(self, weight: Tensor) -> Tensor:
        """``weight`` with this added: in the precision of the parameters, inside autocast too."""
        with torch.autocast(weight.device.type, enabled=False):
            both = weight + (self.up @ self.down) * self.scaling
            return both if self.lengths is None else both * self._scale(both).unsqueeze(1)

    def row_scale(self, weight: Tensor) -> Tensor:
        """(N,) by which the rows of the sum with ``weight`` come to their lengths."""
        with torch.autocast(weight.device.type, enabled=False):
            with torch.no_grad():
                both = weight + (self.up @ self.down) * self.scaling
            return self._scale(both)

    def _scale(self, both: Tensor) -> Tensor:
        """The norm counts as a constant (Liu et al. 2024, §4.3)."""
        assert self.lengths is not None
        return self.lengths / both.norm(dim=1).detach()

    def product(self, rows: Tensor) -> Tensor:
        """(…, K) → (…, N) of the two matrices alone."""
        return F.linear(F.linear(rows, self.down), self.up) * self.scaling


# ---------------------------------------------------------------------- layers that need the weight
#
# With ZeRO-3 a parameter is whole only while the module that owns it runs, and for its backward pass.  So a
# layer which needs the parameters of those inside it has them run, and lend what they have.

Use = Callable[[Tensor, Tensor, Tensor | None], Any]  # of (rows, weight, bias)


class _Lends(nn.Module):
    """A module that multiplies rows with its weight, or lends it."""

    weight: Tensor

    def forward(self, rows: Tensor, use: Use | None = None) -> Any:
        """``use`` of rows, weight and bias; null: their linear map."""
        bias = getattr(self, "bias", None)
        return F.linear(rows, self.weight, bias) if use is None else use(rows, self.weight, bias)


def _lent(module: nn.Module, rows: Tensor, use: Use) -> Any:
    """``use`` of what a module has, which may be of another kind than those that lend (fp8)."""
    if isinstance(module, _Lends):
        return module(rows, use=use)
    return use(rows, module.weight, module.bias)  # type: ignore[arg-type]


def _copied(_: Tensor, weight: Tensor, __: Tensor | None) -> Tensor:
    """What outlives the lending, and is kept for the backward pass."""
    return weight.clone()


def _adapter(layer: Any, rows: Tensor) -> _Adapter:
    """The adapter of a layer of :func:`_lending`."""
    own = [layer.lora_A[NAME], layer.lora_B[NAME]]
    if layer.use_dora[NAME]:
        own.append(layer.lora_magnitude_vector[NAME])
    down, up, *lengths = (_lent(module, rows, _copied) for module in own)
    return _Adapter(down, up, lengths[0] if lengths else None, layer.scaling[NAME])


@cache
def _lending(kind: type[nn.Module]) -> type[Any]:
    return type(f"Lending{kind.__name__}", (_Lends, kind), {})


def _have_lend(layer: Any) -> None:
    """Make what is in an adapted layer lend its parameters."""
    of_dora = [layer.lora_magnitude_vector[NAME]] if layer.use_dora[NAME] else []
    for module in (layer.base_layer, layer.lora_A[NAME], layer.lora_B[NAME], *of_dora):
        if not isinstance(module, _Lends):
            module.__class__ = _lending(type(module))  # type: ignore[arg-type]


def own_forward(model: nn.Module, *, dora: bool) -> None:
    """Give adapted layers of ``model`` the forward passes that they have here: the head its lending, and
    those of dora one that multiplies no unit matrix, compiles, and runs divided."""
    for name, layer in adapted_layers(model).items():
        if name == HEAD or dora:
            layer.__class__ = _adapted_head() if name == HEAD else _dora_linear()
            _have_lend(layer)


@cache
def _adapted_head() -> type[Any]:
    from peft.tuners.lora import Linear

    class AdaptedHead(Linear):
        """A head that lends its weight with the adapter added."""

        def forward(self, hidden_states: Tensor, project: Callable[[Tensor, Tensor], Any] = F.linear) -> Any:
            """As :class:`~dualroute.model.lm_head.NextTokenHead`."""
            adapter = _adapter(self, hidden_states)
            return _lent(
                self.base_layer, hidden_states, lambda rows, weight, _: project(rows, adapter.on(weight))
            )

    return AdaptedHead


@cache
def _dora_linear() -> type[Any]:
    from peft.tuners.lora import Linear

    class DoraLinear(Linear):
        """peft's arithmetic: what is dropped, is dropped from all that the adapter adds."""

        def forward(self, hidden_states: Tensor) -> Tensor:
            """(…, K) → (…, N)."""
            adapter, drop = _adapter(self, hidden_states), self.lora_dropout[NAME]
            drops = self.training and not isinstance(drop, nn.Identity)
            kept = drop(hidden_states) if drops else hidden_states
            thin = adapter.product(kept)

            def brought_to_length(product: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                without = product if bias is None else product - bias
                of_base = F.linear(kept, weight) if drops else without
                scale = adapter.row_scale(weight)
                return (product + (scale - 1) * of_base + scale * thin).to(product.dtype)

            product: Tensor = self.base_layer(hidden_states)
            found: Tensor = _lent(self.base_layer, product, brought_to_length)
            return found

    return DoraLinear


def round_adapted(layer: Any, rounded: Callable[[Tensor], Tensor], *, is_head: bool) -> None:
    """Have a layer multiply with ``rounded`` of its :func:`adapted_weight` from now on."""

    class RoundedAdapted(type(layer)):  # type: ignore[misc]
        """A layer that rounds its weight, the adapter added, in each forward pass."""

        def forward(self, hidden_states: Tensor, project: Callable[[Tensor, Tensor], Any] = F.linear) -> Any:
            """(…, K) → (…, N), or of the head what ``project`` makes."""
            adapter = _adapter(self, hidden_states)

            def multiplied(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
                weight = rounded(adapter.on(weight))
                return project(rows, weight) if is_head else F.linear(rows, weight, bias)

            return _lent(self.base_layer, hidden_states, multiplied)

    layer.__class__ = RoundedAdapted
    _have_lend(layer)
