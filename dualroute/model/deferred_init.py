"""A model without its weights, and its seeded weights one parameter at a time.

In: a configuration.  Here: :func:`build_deferred` builds the model on torch's meta device, where parameters
have shapes and no memory, and notes every call that would have filled one.  :meth:`Draws.tensors` makes these
calls for real, in the same order from the same generator, on one parameter after the other.  Next: a trainer
that shards the model keeps its part of each (``training/parallel/sharded_weights.py``).

The numbers are those of the model that is built at once, to the bit: a weight that is drawn twice is drawn
twice here.  Only what comes last is handed on, so the largest parameter is all that is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dualroute.model.config import ModelConfig
from dualroute.model.transformer import DualRoutingTransformer

#: Functions that fill a whole tensor, its first argument, from the generator or with one value.
_RANDOM = frozenset({"normal_", "uniform_", "kaiming_uniform_"})
_CONSTANT = frozenset({"fill_", "zero_", "zeros_", "ones_", "constant_"})


@dataclass(frozen=True)
class _Call:
    fill: Callable[..., Any]
    parameter: nn.Parameter
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def is_random(self) -> bool:
        return self.fill.__name__ in _RANDOM

    @torch.no_grad()
    def made(self) -> Tensor:
        value = torch.empty(self.parameter.shape, dtype=self.parameter.dtype)
        self.fill(value, *self.arguments, **self.options)
        return value


class _Recorder(TorchFunctionMode):
    """Notes each call that fills a parameter on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        filled = args[0] if args else options.get("tensor")
        if isinstance(filled, nn.Parameter) and filled.is_meta and name[-1:] == "_" and name[-2:] != "__":
            if name in _RANDOM | _CONSTANT:
                rest = {key: value for key, value in options.items() if key != "tensor"}
                self.calls.append(_Call(func, filled, args[1:], rest))
            elif name != "requires_grad_":
                raise RuntimeError(f"{name} changes a parameter in part: it cannot be put off")
        return func(*args, **options)


class Draws:
    """The seeded weights of a model that was built without them.

    Attributes:
        order: Names of all parameters, in the order in which :meth:`tensors` gives them.
    """

    def __init__(self, model: nn.Module, calls: list[_Call]) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        # a module that was replaced on the way is drawn for as well, and then dropped
        self._calls = [(names.get(id(call.parameter)), call) for call in calls]
        self._last = {name: number for number, (name, _) in enumerate(self._calls) if name is not None}
        missing = sorted(set(names.values()) - self._last.keys())
        if missing:
            raise RuntimeError(f"{missing[0]} is never filled by a function that can be put off")
        self.order = sorted(self._last, key=lambda name: self._last[name])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor on the CPU) of every parameter, from torch's global generator.

        Each is dropped here before the next is drawn.
        """
        for number, (name, call) in enumerate(self._calls):
            is_last = name is not None and self._last[name] == number
            if not is_last and not call.is_random:
                continue
            if is_last and name is not None:
                yield name, call.made()  # no name here that would keep it
            else:
                call.made()


def build_deferred(config: ModelConfig) -> tuple[DualRoutingTransformer, Draws]:
    """The model of ``config`` on the meta device, and what would have filled it."""
    with torch.device("meta"), _Recorder() as recorder:
        model = DualRoutingTransformer(config)
    return model, Draws(model, recorder.calls)
