"""Which smaller shape to prune to: what a shape costs, and the cheapest in loss within a target.

In: the parent's shape, the axes that may shrink, and how much loss each axis was measured to cost at a few
sizes (:class:`Sensitivity`).  Out: the :class:`~dualroute.compress.importance.Shape` that meets the target
with the least predicted loss, widths in multiples of 64 or whatever is asked for.

The prediction just adds up the axes' losses.  It only has to rank shapes; what was
chosen is measured afterwards.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from dualroute.compress.config import Axis, Target
from dualroute.compress.importance import Shape
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig

#: A finer grid would only cost time: neighbours differ by less than the prediction's error.
GRID = 48
LATENCY_TRIES = 6
#: fields of `Shape` that an axis changes
FIELDS: dict[Axis, tuple[str, ...]] = {
    "layers": ("num_layers",),
    "dim": ("dim",),
    "ffn": ("ffn_dim",),
    "heads": ("global_groups", "local_groups"),
}


def shape_config(config: ModelConfig, shape: Shape) -> ModelConfig:
    """A configuration of that shape; only for counting (windows per layer are left out)."""
    group = config.heads_per_group
    groups = shape.global_groups + shape.local_groups
    if config.attention == "interleaved":
        groups = shape.global_groups
    dual = config.attention == "dual"
    return dataclasses.replace(
        config,
        num_layers=shape.num_layers,
        dim=shape.dim,
        ffn_dim=shape.ffn_dim,
        num_heads=groups * group,
        num_kv_heads=groups,
        global_heads=shape.global_groups * group if dual else None,
        local_heads=shape.local_groups * group if dual else None,
        layer_ffn_dims=None,
        layer_windows=None,
        layer_top_k=None,
    ).resolved()


def count(config: ModelConfig, shape: Shape, target: Literal["parameters", "flops"], context: int) -> float:
    """Parameters, or training FLOPs per token, of a shape; nothing is allocated."""
    with torch.device("meta"):
        model = DualRoutingTransformer(shape_config(config, shape))
    return model.flops_per_token(context) if target == "flops" else float(model.num_parameters())


def latency(config: ModelConfig, shape: Shape, context: int, device: torch.device) -> float:
    """Seconds of a forward pass over one text of ``context`` tokens, random weights, median of five."""
    torch.manual_seed(0)
    model = DualRoutingTransformer(shape_config(config, shape)).to(device).eval()
    ids = torch.zeros(1, context, dtype=torch.long, device=device)
    taken = []
    with torch.no_grad():
        for _ in range(7):
            begin = time.perf_counter()
            model.head(model.hidden_states(ids)[:, -1])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - begin)
    return statistics.median(taken[2:])


@dataclass(frozen=True)
class Sensitivity:
    """Loss that one axis costs: ``sizes`` as shares of the parent's, ascending to 1; ``losses`` above it."""

    sizes: list[float]
    losses: list[float]

    def at(self, share: float) -> float:
        """Interpolated, and continued along its steepest end below the smallest size that was measured."""
        if share < self.sizes[0]:
            slope = (self.losses[0] - self.losses[1]) / (self.sizes[1] - self.sizes[0])
            return self.losses[0] + max(slope, 0.0) * (self.sizes[0] - share)
        return float(np.interp(share, self.sizes, self.losses))


def axis_sizes(shape: Shape, axis: Axis, multiple: int) -> list[Shape]:
    """The parent's shape with one axis at each size that is allowed, largest (the parent's own) first.

    Heads leave in pairs, one key/value group from each route that has more than one.
    """
    shapes = []
    if axis == "layers":
        shapes = [dataclasses.replace(shape, num_layers=n) for n in range(shape.num_layers, 0, -1)]
    elif axis == "heads":
        fewest = max(shape.global_groups, shape.local_groups) - 1
        shapes = [
            dataclasses.replace(
                shape,
                global_groups=max(shape.global_groups - gone, min(shape.global_groups, 1)),
                local_groups=max(shape.local_groups - gone, min(shape.local_groups, 1)),
            )
            for gone in range(fewest + 1)
        ]
    else:
        field = "dim" if axis == "dim" else "ffn_dim"
        full = getattr(shape, field)
        widths = [full, *(w for w in range((full - 1) // multiple * multiple, 0, -multiple))]
        shapes = [dataclasses.replace(shape, **{field: width}) for width in widths]
    return shapes


def widths_by_need(costs: list[Sensitivity], parents: list[int], total: int, multiple: int) -> list[int]:
    """Feed-forward widths of all layers, of at most ``total`` in all, by what each layer's cut costs.

    A width is a multiple of ``multiple``, or the parent's own.  The next to go is the piece with the least
    loss for each channel, as the layers' sensitivities, measured one layer at a time, predict it.

    Args:
        costs: Of each layer.
        parents: Widths before.
        total: Channels of all layers together.
        multiple: Of the widths.
    """
    widths = list(parents)

    def next_cut(layer: int) -> tuple[float, int, int] | None:
        width = widths[layer]
        smaller = (width - 1) // multiple * multiple
        if smaller < 1:
            return None
        more = costs[layer].at(smaller / parents[layer]) - costs[layer].at(width / parents[layer])
        return more / (width - smaller), layer, smaller

    while sum(widths) > total:
        cuts = [cut for cut in map(next_cut, range(len(widths))) if cut is not None]
        if not cuts:
            break
        _, layer, widths[layer] = min(cuts)
    return widths


def share(shape: Shape, parent: Shape, axis: Axis) -> float:
    """Size of an axis relative to the parent's."""
    if axis == "layers":
        return shape.num_layers / parent.num_layers
    if axis == "dim":
        return shape.dim / parent.dim
    if axis == "ffn":
        return shape.ffn_dim / parent.ffn_dim
    of_parent = parent.global_groups + parent.local_groups
    return (shape.global_groups + shape.local_groups) / of_parent


class Search:
    """The best shape of a model within a target.

    Args:
        config: The parent's, resolved.
        sensitivities: Of each axis that may shrink.
        multiple: Of the widths.
        context: Tokens, for FLOPs and latency.
        device: Where latency is measured.
    """

    def __init__(
        self,
        config: ModelConfig,
        sensitivities: dict[Axis, Sensitivity],
        multiple: int,
        context: int,
        device: torch.device,
    ) -> None:
        self.config, self.sensitivities, self.context, self.device = config, sensitivities, context, device
        self.parent = Shape.of(config)
        self.sizes = {axis: _thinned(axis_sizes(self.parent, axis, multiple)) for axis in sensitivities}

    def predicted_loss(self, shape: Shape) -> float:
        """Sum of the axes' losses."""
        return sum(s.at(share(shape, self.parent, axis)) for axis, s in self.sensitivities.items())

    def best(self, target: Target, keep: float) -> Shape:
        """The shape of at most ``keep`` times the parent's parameters, FLOPs or latency.

        Raises:
            UserError: Even the smallest shape is above that.
        """
        if target == "latency":
            return self._within_latency(keep)
        count_of = self._counter(target)
        return self._best_within(keep * count_of(self.parent), count_of, target, keep)

    def _best_within(
        self, limit: float, count_of: Callable[[Shape], float], target: Target, keep: float
    ) -> Shape:
        fitting = [shape for shape in self._shapes() if count_of(shape) <= limit]
        if not fitting:
            smallest = min(count_of(shape) for shape in self._shapes()) / count_of(self.parent)
            raise UserError(
                f"keep {keep} of the {target} cannot be reached by the axes {', '.join(self.sizes)}: the "
                f"smallest shape has {smallest:.2f} of them; allow more axes, or keep more"
            )
        # the larger one of two that are predicted alike
        return min(fitting, key=lambda shape: (round(self.predicted_loss(shape), 6), -count_of(shape)))

    def _shapes(self) -> Iterator[Shape]:
        for combination in itertools.product(*self.sizes.values()):
            shape = self.parent
            for axis, one in zip(self.sizes, combination, strict=True):
                shape = dataclasses.replace(shape, **{f: getattr(one, f) for f in FIELDS[axis]})
            yield shape

    def _counter(self, target: Literal["parameters", "flops"]) -> Callable[[Shape], float]:
        """Counts any shape from those of a few: every count is a product of sizes, summed."""
        config, parent = self.config, self.parent

        def of(layers: int, dim: int, ffn: int, groups: tuple[int, int]) -> float:
            return count(config, Shape(layers, dim, ffn, *groups), target, self.context)

        whole, groups = (parent.num_layers, parent.dim), (parent.global_groups, parent.local_groups)
        # per layer: a FFN part ∝ dim · ffn, and a rest for each (dim, heads), counted when first seen
        rests: dict[tuple[int, int, int], tuple[float, float]] = {}
        per_ffn = (of(*whole, 2, groups) - of(*whole, 1, groups)) / (parent.num_layers * parent.dim)

        def counted(shape: Shape) -> float:
            key = shape.dim, shape.global_groups, shape.local_groups
            if key not in rests:
                one = of(parent.num_layers, shape.dim, 1, key[1:])
                per_layer = of(parent.num_layers + 1, shape.dim, 1, key[1:]) - one
                rests[key] = one - per_layer * parent.num_layers, per_layer
            base, per_layer = rests[key]
            return base + shape.num_layers * (per_layer + per_ffn * shape.dim * (shape.ffn_dim - 1))

        return counted

    def _within_latency(self, keep: float) -> Shape:
        """Bisects the FLOPs until the measured latency fits."""
        limit = keep * latency(self.config, self.parent, self.context, self.device)
        count_of = self._counter("flops")
        whole = count_of(self.parent)
        low, high, found = 0.0, 1.0, None
        for _ in range(LATENCY_TRIES):
            middle = (low + high) / 2
            try:
                shape = self._best_within(middle * whole, count_of, "latency", keep)
            except UserError:
                low = middle
                continue
            if latency(self.config, shape, self.context, self.device) <= limit:
                low, found = middle, shape
            else:
                high = middle
        if found is None:
            raise UserError(
                f"keep {keep} of the latency cannot be reached by the axes {', '.join(self.sizes)}: "
                f"allow more axes, or keep more"
            )
        return found


def _thinned(shapes: list[Shape]) -> list[Shape]:
    if len(shapes) <= GRID:
        return shapes
    return [shapes[round(i * (len(shapes) - 1) / (GRID - 1))] for i in range(GRID)]
