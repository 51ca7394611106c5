"""What the attention layers' routers do, read now and then.

For one micro-batch :mod:`dualroute.training.monitoring.monitor` switches on every module that has
``collect_statistics``; the modules (:class:`dualroute.attention.DualRouting`) fill ``statistics``, a
dictionary of 0-dim tensors; here they become ``router/<statistic>/layer_00``, … and
``router/<statistic>/mean``.

With activation checkpointing the layers run twice, the second time in the backward pass,
so the switch stays on until the micro-batch is completely done.

A ``block_map``, of two dimensions, is asked for more rarely; :func:`draw_map` makes a figure of it, and
:func:`plain_map` an image where there is no matplotlib.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RouterStatistics:
    """Collects for the time between :meth:`begin` and :meth:`end`."""

    def __init__(self) -> None:
        self._layers: list[nn.Module] = []
        self.maps: dict[str, torch.Tensor] = {}  # {layer: what was collected last, on the CPU}

    def begin(self, model: nn.Module, maps: bool = False) -> None:
        """Switch on, in every module below ``model`` that can; ``maps`` asks for theirs, too."""
        self._layers = [module for module in model.modules() if hasattr(module, "collect_statistics")]
        for layer in self._layers:
            layer.collect_statistics = True  # type: ignore[assignment]
            layer.collect_map = maps  # type: ignore[assignment]

    def end(self) -> dict[str, float]:
        """Switch off; what was collected per layer, and its mean.  Empty without :meth:`begin`."""
        layers, self._layers, self.maps = self._layers, [], {}
        tags: list[tuple[str, str]] = []
        tensors: list[torch.Tensor] = []
        for index, layer in enumerate(layers):
            layer.collect_statistics = layer.collect_map = False  # type: ignore[assignment]
            statistics: dict[str, torch.Tensor] = getattr(layer, "statistics", {})
            for statistic, tensor in statistics.items():
                if tensor.ndim == 2:
                    self.maps[f"layer_{index:02d}"] = tensor.detach().float().cpu()
                    continue
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


def draw_map(block_map: torch.Tensor, title: str) -> Any:
    """A matplotlib figure of a map (rows, columns): which blocks are read from where.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # without pyplot, which keeps every figure

    figure = Figure(figsize=(5, 4.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(block_map.numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    axes.set(title=title, xlabel="block that is read", ylabel="block of the token")
    figure.colorbar(image, ax=axes, label="mean weight")
    return figure


#: Colours of weights 0, 1/4, … 1, as matplotlib's magma has them.
_MAGMA = torch.tensor([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]])
_LEAST_PIXELS = 256


def plain_map(block_map: torch.Tensor) -> torch.Tensor:
    """The map as an image (height, width, 3) of bytes, without axes: for those who have no matplotlib.

    What was not sampled (NaN) is grey.
    """
    place = block_map.nan_to_num(0.0).clamp(0, 1) * (len(_MAGMA) - 1)
    low = place.floor().long().clamp_max(len(_MAGMA) - 2)
    part = (place - low)[..., None]
    colours = _MAGMA[low] * (1 - part) + _MAGMA[low + 1] * part
    colours[block_map.isnan()] = 128.0
    times = -(-_LEAST_PIXELS // max(block_map.shape))
    return colours.round().to(torch.uint8).repeat_interleave(times, 0).repeat_interleave(times, 1)
