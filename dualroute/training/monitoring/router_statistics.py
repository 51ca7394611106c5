"""What the attention layers' routers do, read now and then.

For one micro-batch :mod:`dualroute.training.monitoring.monitor` switches on every module that has
``collect_statistics``; the modules (:class:`dualroute.attention.DualRouting`) fill ``statistics``, a
dictionary of 0-dim tensors; here they become ``router/<statistic>/layer_00``, … and
``router/<statistic>/mean``.

With activation checkpointing the layers run twice, the second time in the backward pass,
so the switch stays on until the micro-batch is completely done.
"""

from __future__ import annotations

import torch
from torch import nn


class RouterStatistics:
    """Collects for the time between :meth:`begin` and :meth:`end`."""

    def __init__(self) -> None:
        self._layers: list[nn.Module] = []

    def begin(self, model: nn.Module) -> None:
        """Switch on, in every module below ``model`` that can."""
        self._layers = [module for module in model.modules() if hasattr(module, "collect_statistics")]
        for layer in self._layers:
            layer.collect_statistics = True  # type: ignore[assignment]

    def end(self) -> dict[str, float]:
        """Switch off; what was collected per layer, and its mean.  Empty without :meth:`begin`."""
        layers, self._layers = self._layers, []
        tags: list[tuple[str, str]] = []
        tensors: list[torch.Tensor] = []
        for index, layer in enumerate(layers):
            layer.collect_statistics = False  # type: ignore[assignment]
            statistics: dict[str, torch.Tensor] = getattr(layer, "statistics", {})
            for statistic, tensor in statistics.items():
                tags.append((statistic, f"layer_{index:02d}"))
                tensors.append(tensor.detach().float().reshape(()))
        if not tensors:
            return {}
        numbers = torch.stack(tensors).tolist()  # one copy from the device
        values = {
            f"router/{statistic}/{layer}": number
            for (statistic, layer), number in zip(tags, numbers, strict=True)
        }
        for statistic in dict(tags):
            of_layers = [number for (name, _), number in zip(tags, numbers, strict=True) if name == statistic]
            values[f"router/{statistic}/mean"] = sum(of_layers) / len(of_layers)
        return values
