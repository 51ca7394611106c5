"""The floating-point operations of a token, from a model's configuration alone.

In: a :class:`~dualroute.model.config.ModelConfig`.  Next: ``dualroute estimate``, and model FLOPs of a run
through :meth:`DualRoutingTransformer.flops_per_token`.  No torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualroute.attention.core.options import AUTO_BREAK_EVEN
from dualroute.model.config import ModelConfig
from dualroute.model.cost.shapes import heads_of, numel, parameter_shapes


def routed(layer: ModelConfig, context: int) -> bool:
    """Whether a document of ``context`` tokens is routed in this layer, rather than read in full."""
    if layer.attention == "dense" or layer.global_mode == "full" or not heads_of(layer)[0]:
        return False
    blocks = layer.top_k + 2  # the own one and the sink besides: then everything is read
    if layer.global_mode == "auto":
        blocks = max(blocks, (layer.auto_break_even or AUTO_BREAK_EVEN) // layer.block)
    return context > blocks * layer.block


def keys_read(layer: ModelConfig, context: int) -> tuple[float, float]:
    """Keys that one token of a document reads on average: all heads of the global, of the local route."""
    window = min(layer.window, context)
    before = window - window * (window - 1) / (2 * context)  # within the window, the token included
    everything, local, own = (context + 1) / 2, before, 0.5
    if not layer.causal:
        everything, local, own = context, 2 * before - 1, 1.0
        grid = layer.grid
        if grid is not None:  # a square, cut off at the edges
            sides = (grid.height, grid.width)
            reach = [2 * (w - w * (w - 1) / (2 * side)) - 1 for side in sides for w in [min(window, side)]]
            local = reach[0] * reach[1]
    global_heads, local_heads = heads_of(layer)
    if routed(layer, context):
        everything = min(everything, (layer.top_k + 1 + own) * layer.block)  # sink, chosen blocks, own one
    return global_heads * everything, local_heads * local


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a token, forward and backward, nothing computed twice.

    Attributes:
        layers: Products of the layers, 6 for each weight (Kaplan et al. 2020, §2.1).
        head: The product with the vocabulary.
        global_route, local_route: 12·head_dim for each head and key read.
        router: The choice of blocks, forward only, since nothing is trained through it.
        summary: What stands for the blocks that are far.
    """

    layers: float
    head: float
    global_route: float
    local_route: float
    router: float = 0.0
    summary: float = 0.0

    @property
    def of_model(self) -> float:
        """Without router and summary: what a utilisation counts."""
        return self.layers + self.head + self.global_route + self.local_route

    @property
    def total(self) -> float:
        """All of it."""
        return self.of_model + self.router + self.summary


def training_flops(config: ModelConfig, context: int) -> Flops:
    """Of a token in documents of ``context`` tokens."""
    config = config.resolved()
    assert config.head_dim is not None
    shapes = parameter_shapes(config)
    layers = sum(numel(shape) for name, shape in shapes.items() if name not in _VOCABULARY)
    head = 0 if config.task_head is not None else (config.vocab_size or 0) * config.dim
    of_global = of_local = router = summary = 0.0
    for number, chooser in enumerate(config.choosers):
        layer = config.of_layer(number)
        read = keys_read(layer, context)
        of_global, of_local = of_global + read[0], of_local + read[1]
        of_router, of_far = routing_units(layer, context, chooses=chooser == number)
        router, summary = router + of_router, summary + of_far
    d = config.head_dim
    return Flops(6.0 * layers, 6.0 * head, 12 * d * of_global, 12 * d * of_local, d * router, 3 * d * summary)


_VOCABULARY = ("embedding.weight", "head.weight")


def routing_units(layer: ModelConfig, context: int, *, chooses: bool = True) -> tuple[float, float]:
    """Forward operations of a token of one layer, in units of head_dim: choosing blocks, unless another layer
    `chooses`, and what stands for far ones; over all heads.

    minmax: two products with the bounds of each sub-block; moment: with mean and variance of each block;
    mean: one.  A far block costs two products, three with a second order.
    """
    if not routed(layer, context):
        return 0.0, 0.0
    of_router = {"minmax": 4 / layer.sub_block, "moment": 4 / layer.block, "mean": 2 / layer.block}
    of_far = {"second_order": 6, "first_order": 4, "none": 0}
    pairs = heads_of(layer)[0] * (context / 2 if layer.causal else context)
    return chooses * of_router[layer.router] * pairs, of_far[layer.far_summary] / layer.block * pairs
