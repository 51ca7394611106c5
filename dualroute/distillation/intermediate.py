"""What a student may learn from inside its teacher: hidden states of layers, and what the heads read.

In: one forward pass of each model, watched by :func:`recording`.  Here, for every pair (student's layer,
teacher's layer), averaged over the pairs and summed over the tokens that have a label:

    hidden      mean over the width of (W h_s − h_t)², or 1 − cos(W h_s, h_t); W is a trained projection to
                the teacher's width (FitNets, Romero et al. 2015, arXiv:1412.6550; TinyBERT, arXiv:1909.10351)
    attention   mean over the width of (o_s − o_t)², the outputs of the heads before the output projection,
                for the global and the local route each

Next: :mod:`~dualroute.distillation.module` adds both to the objective.

Nothing in the model knows of it.  The outputs of a layer and the inputs of its output
projection pass through hooks that are there for one forward pass only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualroute.errors import UserError
from dualroute.model.config import ModelConfig

Pairs = list[tuple[int, int]]  # (student's layer, teacher's layer), from 0


@dataclass
class Recorded:
    """Of each watched layer: its output (B, n, D) and its heads' outputs (B, n, H · d)."""

    outputs: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def recording(model: Any, layers: Iterable[int], *, heads: bool = False) -> Iterator[Recorded]:
    """Watch some layers of ``model`` while the context is open; a second pass overwrites the first."""
    seen, hooks = Recorded(), []

    def keep_output(number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen.outputs[number] = output

        return hook

    def keep_heads(number: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.heads[number] = inputs[0]

        return hook

    for number in layers:
        layer = model.layers[number]
        hooks.append(layer.register_forward_hook(keep_output(number)))
        if heads:
            hooks.append(layer.attention.out_proj.register_forward_pre_hook(keep_heads(number)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def layer_pairs(layer_map: list[int] | None, student: int, teacher: int) -> Pairs:
    """Which layer learns from which.

    Args:
        layer_map: For every layer of the student the teacher's layer, −1 for none; null spreads the
            teacher's layers evenly, the last to the last.
        student: Number of the student's layers.
        teacher: Number of the teacher's layers.

    Raises:
        UserError: The map has another length, or names a layer that does not exist.
    """
    if layer_map is None:
        return [(i, max(0, round((i + 1) * teacher / student) - 1)) for i in range(student)]
    if len(layer_map) != student or not all(-1 <= layer < teacher for layer in layer_map):
        raise UserError(
            f"distill.layer_map is {layer_map}: give {student} numbers, one for each layer of the student, "
            f"from 0 to {teacher - 1} (the teacher's layers), or -1 for none"
        )
    pairs = [(i, layer) for i, layer in enumerate(layer_map) if layer >= 0]
    if not pairs:
        raise UserError(
            "distill.layer_map leaves out every layer: set hidden_weight and attention_weight to 0"
        )
    return pairs


def check_heads(pairs: Pairs, student: ModelConfig, teacher: ModelConfig) -> None:
    """Refuse an attention loss between heads that do not correspond.

    Raises:
        UserError: Naming the first pair of layers, and both numbers.
    """
    for ours, theirs in pairs:
        one, other = student.of_layer(ours), teacher.of_layer(theirs)
        for name in ("global_heads", "local_heads", "head_dim"):
            mine, its = getattr(one, name), getattr(other, name)
            if mine != its:
                raise UserError(
                    f"distill.attention_weight compares heads one by one, but layer {ours} of the student "
                    f"has {name} {mine} and layer {theirs} of the teacher {its}: set it to 0, or give a "
                    f"distill.layer_map of layers that match (hidden_weight works with any)"
                )


class Projections(nn.ModuleDict):
    """W of each watched layer of the student: the identity where widths agree, else random.

    They are trained and saved with the training's state, and never published with the model.
    """

    def __init__(self, pairs: Pairs, student_dim: int, teacher_dim: int, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        for ours, _ in pairs:
            projection = nn.Linear(student_dim, teacher_dim, bias=False)
            with torch.no_grad():
                if student_dim == teacher_dim:
                    nn.init.eye_(projection.weight)
                else:
                    projection.weight.normal_(0, student_dim**-0.5, generator=draw)
            self[str(ours)] = projection


def hidden_sum(
    student: Recorded,
    teacher: Recorded,
    pairs: Pairs,
    projections: Projections,
    rows: Tensor,
    kind: Literal["mse", "cosine"],
) -> Tensor:
    """Sum of the hidden-state loss over ``rows`` (R,) of the flattened (B · n) tokens, 0-dim float32."""
    total = torch.zeros((), device=rows.device)
    for ours, theirs in pairs:
        own = projections[str(ours)](student.outputs[ours].flatten(0, 1)[rows]).float()
        aim = teacher.outputs[theirs].flatten(0, 1)[rows].float()
        if kind == "mse":
            total = total + (own - aim).square().mean(-1).sum()
        else:
            total = total + (1 - F.cosine_similarity(own, aim, dim=-1)).sum()
    return total / len(pairs)


def attention_sum(
    student: Recorded, teacher: Recorded, pairs: Pairs, rows: Tensor, widths: list[tuple[int, int]]
) -> Tensor:
    """Sum of the attention loss over ``rows``; ``widths`` are H · d of the global and local route by pair."""
    total = torch.zeros((), device=rows.device)
    for (ours, theirs), of_routes in zip(pairs, widths, strict=True):
        own, aim = (
            seen.heads[layer].flatten(0, 1)[rows].float().split(of_routes, -1)
            for seen, layer in ((student, ours), (teacher, theirs))
        )
        for one, other in zip(own, aim, strict=True):
            if one.shape[-1]:
                total = total + (one - other).square().mean(-1).sum()
    return total / len(pairs)


def route_widths(pairs: Pairs, student: ModelConfig) -> list[tuple[int, int]]:
    """(global, local) width H · d of the student's layer of each pair."""
    layers = [student.of_layer(ours) for ours, _ in pairs]
    return [
        ((layer.global_heads or 0) * (layer.head_dim or 0), (layer.local_heads or 0) * (layer.head_dim or 0))
        for layer in layers
    ]
