"""Which channels, heads and layers stay: scores, and the choice of a shape's worth of them.

In: :class:`~dualroute.compress.calibration.Statistics` and the sizes that are wanted.  Out: :class:`Kept`,
the indices of what stays, sorted.  The scores of channels and heads are root mean squares of what they add:

    FFN channel i         √E[a_i²] · ‖W_down[:, i]‖        (|W|·‖X‖ of Wanda, Sun et al. 2024, eq. 1)
    key/value group g     √E‖W_out[:, g] o_g‖²             (the heads that share its keys, together)
    residual channel j    Σ over norms √E[norm(x)_j²]      (Minitron, Muralidharan et al. 2024, §2.2,
                                                            https://arxiv.org/abs/2407.14679)
    layer                 1 - cos(input, output)           (block influence)

``random`` is a criterion like any other.  A pruning method that does not beat it has
shown nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dualroute.compress.calibration import Statistics
from dualroute.compress.config import Criterion
from dualroute.model import DualRoutingTransformer, ModelConfig


@dataclass(frozen=True)
class Shape:
    """The sizes that pruning changes.

    Attributes:
        num_layers, dim, ffn_dim: As in `ModelConfig`; of layers that differ, their mean width, rounded down.
        global_groups, local_groups: Key/value groups of each route (of a layer's only route, in a model with
            one).
    """

    num_layers: int
    dim: int
    ffn_dim: int
    global_groups: int
    local_groups: int

    @classmethod
    def of(cls, config: ModelConfig) -> Shape:
        """The shape of a resolved configuration."""
        assert config.global_heads is not None
        assert config.local_heads is not None
        group = config.heads_per_group
        return cls(
            config.num_layers,
            config.dim,
            sum(config.ffn_dims) // config.num_layers,
            config.global_heads // group,
            config.local_heads // group,
        )


@dataclass(frozen=True)
class Kept:
    """Indices of what stays, ascending; of each layer that stays, where layers differ."""

    layers: list[int]
    channels: Tensor
    ffn: list[Tensor]
    global_groups: list[Tensor]
    local_groups: list[Tensor]


def choose(
    model: DualRoutingTransformer,
    statistics: Statistics,
    shape: Shape,
    criterion: Criterion,
    seed: int = 0,
    widths: list[int] | None = None,
) -> Kept:
    """The best parts of ``model`` that make up ``shape``; random ones with criterion ``random``.

    ``widths`` are those of the feed-forwards of the layers that stay; null gives each the same share of its
    own, which makes the shape's of layers that are equal.
    """
    generator = torch.Generator().manual_seed(seed)

    def best(scores: Tensor, count: int) -> Tensor:
        count = min(count, len(scores))
        if criterion == "random" and count < len(scores):
            scores = torch.rand(len(scores), generator=generator)
        return scores.topk(count).indices.sort().values

    influence = torch.tensor([layer.influence for layer in statistics.layers])
    layers = best(influence, shape.num_layers).tolist()
    channels = best(channel_scores(statistics), shape.dim)
    ffn, global_groups, local_groups = [], [], []
    for number, index in enumerate(layers):
        scores = ffn_scores(model, statistics, index)
        same_share = len(scores) * shape.ffn_dim // Shape.of(model.config).ffn_dim
        ffn.append(best(scores, max(1, same_share) if widths is None else widths[number]))
        of_global, of_local = group_scores(model, statistics, index)
        global_groups.append(best(of_global, shape.global_groups))
        only_local = model.config.global_layers is not None and not len(of_global)  # keeps all its heads
        local_groups.append(best(of_local, len(of_local) if only_local else shape.local_groups))
    return Kept(layers, channels, ffn, global_groups, local_groups)


def channel_scores(statistics: Statistics) -> Tensor:
    """(dim,) of the residual channels."""
    return torch.stack([energy.sqrt() for energy in statistics.norm_outputs.values()]).sum(0).cpu()


def ffn_scores(model: DualRoutingTransformer, statistics: Statistics, index: int) -> Tensor:
    """(ffn_dim,) of the channels of one layer."""
    layer: Any = model.layers[index]
    columns = layer.ffn.down.weight.detach().float().norm(dim=0)
    return (statistics.layers[index].ffn_gram.diagonal().sqrt() * columns).cpu()


def group_scores(model: DualRoutingTransformer, statistics: Statistics, index: int) -> tuple[Tensor, Tensor]:
    """(groups of the global route,), (groups of the local route,) of one layer."""
    attention: Any = model.layers[index].attention
    weight = attention.out_proj.weight.detach().float()  # (dim, heads · head_dim)
    width = attention.group * attention.head_dim
    parts = weight.split(width, dim=1)  # one (dim, width) for each group
    gram = statistics.layers[index].heads_gram
    energies = [
        # E‖W o‖² = trace(W E[o oᵀ] Wᵀ)
        (part @ gram[at : at + width, at : at + width]).mul(part).sum()
        for at, part in zip(range(0, len(gram), width), parts, strict=True)
    ]
    scores = torch.stack(energies).clamp_min(0).sqrt().cpu()
    return tuple(scores.split([attention.global_heads // attention.group,
                               attention.local_heads // attention.group]))  # fmt: skip
