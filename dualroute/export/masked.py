"""The model as one graph that holds for any batch and any length: what ONNX and torch.export are given.

In: a `DualRoutingTransformer`.  Out: `MaskedTransformer`, the same weights and the same layers with each
    route written as a masked softmax over all keys; next, a tracer records it.

The fast routes sort tokens by the blocks they chose, so the shapes inside them depend on the numbers: no
graph of fixed operators can hold that.  Here nothing but masks depends on numbers.  The price is the far
summary's gain: every pair of tokens is scored, n² in time and memory for each head, as dense attention
without a fused kernel.

"auto" is in the graph as well.  Whether a text is short enough to be read in full is a
number computed from its length, which opens the mask; so one file behaves like the model at every length.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualroute.attention import DualRouting
from dualroute.attention.core.far_summary import far_keys, far_query_features
from dualroute.attention.core.rope import rotary_table
from dualroute.attention.core.router import block_features, query_features
from dualroute.model import DualRoutingTransformer
from dualroute.model.layers import TransformerBlock

CLOSED = -torch.inf


class MaskedTransformer(nn.Module):
    """Token ids (B, n) → logits (B, n, V), equal to the model's for texts without padding.

    Args:
        model: Whose parameters are used, not copied.
        for_onnx: Choose blocks by top-k instead of a stable sort, which ONNX does not have.  Of equal scores
            its own TopK takes the first, as the router does; torch's takes any.
    """

    def __init__(self, model: DualRoutingTransformer, for_onnx: bool = False) -> None:
        super().__init__()
        self.model, self.for_onnx = model, for_onnx

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.model.embedding(input_ids)
        for layer in self.model.layers:
            assert isinstance(layer, TransformerBlock)
            hidden = hidden + masked_attention(layer.attention, layer.attention_norm(hidden), self.for_onnx)
            hidden = hidden + layer.ffn(layer.ffn_norm(hidden))
        return self.model.head(self.model.norm(hidden))


def masked_attention(layer: DualRouting, hidden_states: Tensor, for_onnx: bool = False) -> Tensor:
    """What ``layer(hidden_states)`` gives, (B, n, dim), for one causal document in each row."""
    positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    table = _rotary_table(layer, positions, hidden_states.dtype)
    outputs = []
    if layer.global_qkv is not None:
        query, key, value = _heads(layer, layer.global_qkv(hidden_states), table)
        outputs.append(_global(layer, query, key, value, positions, for_onnx))
    if layer.local_qkv is not None:
        query, key, value = _heads(layer, layer.local_qkv(hidden_states), table)
        distance = positions[:, None] - positions
        outputs.append(_attend(query, key, value, (distance >= 0) & (distance < layer.window)))
    heads = torch.cat(outputs, dim=1).transpose(1, 2).flatten(2)  # (B, n, H * d)
    if layer.gate_weight is not None:
        gate = 2 * torch.sigmoid(F.linear(hidden_states, layer.gate_weight))  # (B, n, H)
        heads = (heads.unflatten(-1, (-1, layer.head_dim)) * gate[..., None]).flatten(2)
    return layer.out_proj(heads)


def _rotary_table(layer: DualRouting, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (n, d / 2)."""
    cosine, sine = rotary_table(positions, layer.head_dim, layer.rope_theta, dtype, layer.rope_scaling)
    return cosine[:, 0], sine[:, 0]


def _heads(layer: DualRouting, rows: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (B, H_kv, group, n, d), keys (B, H_kv, n, d) and values (B, H_kv, n, d)."""
    kv_heads = rows.shape[-1] // layer.head_dim // (layer.group + 2)
    rows = rows.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)  # (B, H + 2 H_kv, n, d)
    query, key, value = rows.split([kv_heads * layer.group, kv_heads, kv_heads], dim=1)
    if layer.query_norm is not None and layer.key_norm is not None:
        query, key = layer.query_norm(query), layer.key_norm(key)
    query, key = _turned(query, table), _turned(key, table)
    return query.unflatten(1, (kv_heads, layer.group)), key, value


def _turned(rows: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = table
    x, y = rows.chunk(2, dim=-1)
    return torch.cat([x * cosine - y * sine, y * cosine + x * sine], dim=-1)


def _attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """softmax over the allowed keys (n, n) or (B, H_kv, 1, n, n), times the values: (B, H, n, d)."""
    logits = query @ key[:, :, None].transpose(-1, -2) / math.sqrt(query.shape[-1])
    weights = logits.masked_fill(~allowed, CLOSED).softmax(-1)
    return (weights @ value[:, :, None]).flatten(1, 2)


def _global(
    layer: DualRouting, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, for_onnx: bool
) -> Tensor:
    """The global route: reference.routed with every block at once, or reference.full."""
    causal = positions <= positions[:, None]  # (n, n)
    limit = layer.max_exact_blocks
    if limit is None:
        return _attend(query, key, value, causal)
    block = layer.block
    length = key.shape[2]
    blocks = (
        length // block + 2
    )  # more than there are: a tracer takes a size of 1, or none to add, for a rule
    keys, values = (
        F.pad(rows, (0, 0, 0, blocks * block - length)).reshape(*rows.shape[:2], blocks, block, rows.shape[3])
        for rows in (key, value)
    )  # (B, H_kv, nb, block, d)
    number = torch.arange(blocks, device=key.device)  # (nb,)
    own = positions[:, None] // block  # (n, 1)
    past = number < own  # complete blocks before the token's own
    selected = _selected(layer, query, keys, past & (number > 0), for_onnx)  # (B, H_kv, n, nb)
    in_full = positions[-1] // block + 1 <= limit  # the whole text: nothing is routed
    read = selected | (number == own) | (number == 0) | in_full
    # (B, H_kv, 1, n, n): each key is read if its block is
    allowed = read[..., positions // block][:, :, None] & causal
    logits = query @ key[:, :, None].transpose(-1, -2) / math.sqrt(query.shape[-1])
    logits = logits.masked_fill(~allowed, CLOSED)
    if layer.routing.far_summary == "none":
        return (logits.softmax(-1) @ value[:, :, None]).flatten(1, 2)
    pseudo = far_keys(keys, layer.routing.far_summary)  # (B, H_kv, nb, f)
    features = far_query_features(query, pseudo.shape[-1])
    far = features @ pseudo[:, :, None].transpose(-1, -2) + math.log(block)
    far = far.masked_fill(~(past & ~read)[:, :, None], CLOSED)
    weights = torch.cat([logits, far], dim=-1).softmax(-1)
    return (weights @ torch.cat([value, values.mean(3)], dim=2)[:, :, None]).flatten(1, 2)


def _selected(layer: DualRouting, query: Tensor, keys: Tensor, candidates: Tensor, for_onnx: bool) -> Tensor:
    """(B, H_kv, n, nb), True at the top_k best candidates (n, nb); of equal ones the first, as in
    `router`."""
    routing = layer.routing
    if routing.top_k == 0:
        return torch.zeros_like(candidates).expand(*query.shape[:2], *candidates.shape)
    features = block_features(keys, routing.router, routing.sub_block)  # (B, H_kv, nb, parts, f)
    rows = query_features(query.flatten(0, 1), routing.router).unflatten(0, query.shape[:2])
    scores = torch.stack(
        [rows @ features[..., part, :].transpose(-1, -2) for part in range(features.shape[-2])]
    ).amax(0)  # (B, H_kv, n, nb)
    scores = scores.masked_fill(~candidates, CLOSED)
    # nb may be below top_k: columns that are no blocks make the sort long enough
    padded = F.pad(scores, (0, routing.top_k), value=CLOSED)
    if for_onnx:
        place = padded.topk(routing.top_k, dim=-1).indices
    else:
        place = padded.sort(dim=-1, descending=True, stable=True).indices[..., : routing.top_k]
    chosen = torch.zeros_like(padded, dtype=torch.bool).scatter(-1, place, True)
    return chosen[..., : scores.shape[-1]] & candidates
