"""The numbers of ``dualroute inspect``: what each token reads in each layer, and what each part is worth.

In: a causal model and the ids of one text.  Here: one pass in which the inputs of every attention are kept,
from which :mod:`~dualroute.evaluate.inspect.weights` computes all weights anew, and one pass for each part
that is switched off.  Out: an :class:`Inspection`, plain arrays.  Next:
:mod:`~dualroute.evaluate.inspect.page` shows them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dualroute.attention.core.layout import Layout
from dualroute.attention.core.routing import SharedChoice
from dualroute.attention.layer import DualRouting
from dualroute.errors import UserError
from dualroute.evaluate.inspect.ablation import Ablation, ablations_of, switched_off
from dualroute.evaluate.inspect.config import MOST_TOKENS
from dualroute.evaluate.inspect.weights import FAR, NOT_READ, by_block, global_weights, local_weights
from dualroute.model import DualRoutingTransformer
from dualroute.model.steering import attentions

#: Tokens that are named for each query as needed and not read.
MISSED = 3
#: Rows of logits that exist at once.
LOGIT_ROWS = 512
Array = NDArray[Any]
Given = tuple[DualRouting, Tensor, Layout, SharedChoice | None, Tensor]


@dataclass
class LayerReading:
    """What n tokens read in one layer with H_g global and H_l local heads; float32 where nothing is said.

    Attributes:
        block_weights: (H_g, n, nb) weight of each block; the rows sum to 1.
        kinds: (H_g, n, nb) uint8, how it is read: a number of `weights.KINDS`.
        full_block_weights: (H_g, n, nb) what full attention would give it, with the same queries and keys.
        missed_tokens: (H_g, n, 3) int32, keys with most weight in full attention among those that are not
            read exactly, -1 for none.
        missed_weights: (H_g, n, 3) their weights in full attention.
        far_mass: (H_g, n) weight of all blocks that are read as a summary.
        window_weights: (H_l, n, w) weight of the keys 0, 1, … w - 1 tokens back.
        shares: (H_g + H_l, n) length of what a head adds to the token over the sum of the heads' lengths,
            gate and scale included.
        difference: Largest difference of this layer's output, computed from these weights, to what the model
            itself computed, over the largest output.
    """

    block_weights: Array
    kinds: Array
    full_block_weights: Array
    missed_tokens: Array
    missed_weights: Array
    far_mass: Array
    window_weights: Array
    shares: Array
    difference: float


@dataclass
class Inspection:
    """What a model does with one text of n tokens.

    Attributes:
        tokens: How each token is written.
        ids: (n,) int64.
        block: Tokens of a block.
        layers: One for each layer.
        losses: (n - 1,) float32, nats for the token behind each one.
        ablations: What was switched off.
        kl: (A, n) float32, Kullback–Leibler divergence in nats of what the model says with the part switched
            off from what it says as it is.
        loss_change: (A, n - 1) float32, by how much each loss rose.
        notes: Lines for the reader.
    """

    tokens: list[str]
    ids: Array
    block: int
    layers: list[LayerReading]
    losses: Array
    ablations: list[Ablation] = field(default_factory=list)
    kl: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    loss_change: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def inspect_ids(
    model: DualRoutingTransformer,
    ids: Sequence[int],
    tokens: Sequence[str],
    ablations: Iterable[str] = ("routes", "heads", "layers", "blocks"),
) -> Inspection:
    """Look at a text.

    Args:
        model: On its device.
        ids: Of the text, 2 to 4096 and no more than the model reads.
        tokens: How each is written.
        ablations: Kinds of parts to switch off, see :func:`ablations_of`.

    Raises:
        UserError: The model is not causal or reads no tokens, the text is too short or long, or a logit is
            not a number.
    """
    model.config.require_causal("inspection")
    if not model.config.reads_text or model.task_head is not None:
        raise UserError("inspection looks at language models: this one reads or writes something else")
    most = min(MOST_TOKENS, model.config.max_context)
    if not 2 <= len(ids) <= most:
        raise UserError(f"the text has {len(ids)} tokens, and 2 to {most} can be inspected: change it")
    was_training = model.training
    model.eval()
    try:
        given, hidden = _attention_inputs(model, torch.tensor([list(ids)], device=model.norm.weight.device))
        layers = [_layer_reading(*one) for one in given]
        targets = torch.tensor(list(ids[1:]), device=hidden.device)
        losses = _losses(model, hidden, targets)
        if not bool(losses.isfinite().all()):
            raise UserError("the model's losses are not finite: it has diverged, and shows nothing")
        found = Inspection(
            list(tokens), np.asarray(ids, np.int64), model.config.block, layers, _array(losses)
        )
        found.ablations = ablations_of(model, len(ids), ablations)
        rows = [_effect(model, hidden, targets, losses, ids, what) for what in found.ablations]
        if rows:
            found.kl = np.stack([_array(kl) for kl, _ in rows])
            found.loss_change = np.stack([_array(change) for _, change in rows])
        return found
    finally:
        model.train(was_training)


def _attention_inputs(model: DualRoutingTransformer, ids: Tensor) -> tuple[list[Given], Tensor]:
    """(attention, input, layout, choice, output) of each layer, and the last hidden states (n, dim)."""
    given: list[Given] = []

    def keep(module: Any, args: tuple[Tensor], named: dict[str, Any], output: Tensor) -> None:
        given.append((module, args[0], named["layout"], named["choice"], output))

    handles = [layer.register_forward_hook(keep, with_kwargs=True) for layer in attentions(model)]
    try:
        hidden = model.hidden_states(ids)[0]
    finally:
        for handle in handles:
            handle.remove()
    return given, hidden


def _layer_reading(
    layer: DualRouting, hidden: Tensor, layout: Layout, choice: SharedChoice | None, output: Tensor
) -> LayerReading:
    length, block = hidden.shape[1], layer.block
    number_of_blocks = -(-length // block)
    empty = torch.zeros(0, length, number_of_blocks)
    reading = {
        "block_weights": empty,
        "kinds": empty,
        "full_block_weights": empty,
        "missed_tokens": torch.zeros(0, length, MISSED),
        "missed_weights": torch.zeros(0, length, MISSED),
        "far_mass": torch.zeros(0, length),
        "window_weights": torch.zeros(0, length, min(layer.window, length)),
    }
    outputs = []
    if layer.global_qkv is not None:
        rows = layer.stream_heads(layer.global_qkv, layer.global_rope, hidden, layout, None, False)
        found = global_weights(layer, *rows, length, choice=choice)
        reading["block_weights"] = by_block(found.keys, block) + found.far
        reading["kinds"] = found.kinds
        reading["full_block_weights"] = by_block(found.full, block)
        reading["far_mass"] = found.far.sum(-1)
        unread = (found.kinds == FAR) | (found.kinds == NOT_READ)
        of_keys = unread[:, :, torch.arange(length, device=hidden.device) // block]
        best = found.full.masked_fill(~of_keys, 0).topk(min(MISSED, length), -1)
        missing = (0, MISSED - best.values.shape[-1])
        reading["missed_weights"] = F.pad(best.values, missing)
        reading["missed_tokens"] = F.pad(best.indices.masked_fill(best.values <= 0, -1), missing, value=-1)
        outputs.append(found.outputs)
    if layer.local_qkv is not None:
        rows = layer.stream_heads(layer.local_qkv, layer.local_rope, hidden, layout, None, False)
        reading["window_weights"], near = local_weights(layer, *rows, length)
        outputs.append(near)
    heads = torch.cat(outputs).transpose(0, 1).to(hidden.dtype)  # (n, H, d)
    lengths = []
    for head in range(heads.shape[1]):
        alone = torch.zeros_like(heads)
        alone[:, head] = heads[:, head]
        lengths.append(layer.combine(alone.flatten(1)[None], hidden)[0].float().norm(dim=-1))
    added = torch.stack(lengths)  # (H, n)
    again = layer.combine(heads.flatten(1)[None], hidden)
    largest = output.float().abs().max().clamp_min(1e-30)
    difference = float((again.float() - output.float()).abs().max() / largest)
    integers = {"kinds": np.uint8, "missed_tokens": np.int32}
    arrays = {name: _array(value, integers.get(name, np.float32)) for name, value in reading.items()}
    shares = _array(added / added.sum(0).clamp_min(1e-30))
    return LayerReading(**arrays, shares=shares, difference=difference)


def _array(values: Tensor, dtype: Any = np.float32) -> Array:
    return values.detach().cpu().double().numpy().astype(dtype)


def _losses(model: DualRoutingTransformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """(n - 1,) nats of each next token."""
    parts = [
        F.cross_entropy(model.head(rows).float(), of, reduction="none")
        for rows, of in zip(hidden[:-1].split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    ]
    return torch.cat(parts)


def _effect(
    model: DualRoutingTransformer,
    hidden: Tensor,
    targets: Tensor,
    losses: Tensor,
    ids: Sequence[int],
    what: Ablation,
) -> tuple[Tensor, Tensor]:
    """Divergence (n,) and rise of the loss (n - 1,) with a part switched off."""
    with switched_off(model, what):
        without = model.hidden_states(torch.tensor([list(ids)], device=hidden.device))[0]
    divergence = []
    for rows, others in zip(hidden.split(LOGIT_ROWS), without.split(LOGIT_ROWS), strict=True):
        before = model.head(rows).float().log_softmax(-1)
        after = model.head(others).float().log_softmax(-1)
        divergence.append((before.exp() * (before - after)).sum(-1).clamp_min(0))
    return torch.cat(divergence), _losses(model, without, targets) - losses
