"""The layer as fixed operators that hold for any batch and any length: what a tracer records.

In: a layer's `Projections` and hidden states (B, n, dim). Out: what the layer gives, each route written as a
masked softmax over all keys.

The other back ends sort tokens by the blocks they chose, so the shapes inside them depend on the numbers: no
graph of fixed operators can hold that. Here nothing but masks depends on numbers. The price is the far
summary's gain: every pair of tokens is scored, n² in time and memory for each head, as dense attention
without a fused kernel.

"auto" is in the graph as well. Whether a text is short enough to be read in full is a
number computed from its length, which opens the mask; so one file behaves like the model at every length.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.attention.core.far_summary import far_keys
from dualroute.attention.core.joint_softmax import Past, joint_softmax, routed_by_mask
from dualroute.attention.core.precision import NEG_INF
from dualroute.attention.core.rope import Table
from dualroute.attention.core.router import block_features, query_features, token_mean
from dualroute.attention.projections import Projections


def traceable_attention(
    layer: Projections,
    hidden_states: Tensor,
    for_onnx: bool = False,
    choice: dict[str, Tensor] | None = None,
) -> Tensor:
    """What ``layer(hidden_states)`` gives, (B, n, dim), for one document in each row.

    Layers that are given the same `choice`, empty at first, read the blocks that the first of them chooses.

    Raises:
        ValueError: the layer reads images, or its blocks are of similar keys.
    """
    if layer.grid is not None:
        raise ValueError("a layer with a grid has no graph of fixed operators: run the layer itself")
    if layer.routing.cluster_span and layer.global_heads and layer.max_exact_blocks is not None:
        raise ValueError(
            f"cluster_span={layer.routing.cluster_span} has no graph of fixed operators: run the layer itself"
        )
    positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    tables = layer.rotary_tables(positions, hidden_states.dtype)
    far_table, near_table = (None if table is None else (table[0][:, 0], table[1][:, 0]) for table in tables)
    outputs = []
    if layer.global_qkv is not None:
        query, key, value = _heads(layer, layer.global_qkv(hidden_states), far_table)
        outputs.append(_global(layer, query, key, value, positions, for_onnx, choice))
    if layer.local_qkv is not None:
        query, key, value = _heads(layer, layer.local_qkv(hidden_states), near_table)
        distance = positions[:, None] - positions
        near = distance < layer.window
        near = near & (distance >= 0) if layer.causal else near & (distance > -layer.window)
        outputs.append(_attend(query, key, value, near))
    heads = torch.cat(outputs, dim=1).transpose(1, 2).flatten(2)  # (B, n, H * d)
    if layer.gate_weight is not None:
        gate = 2 * torch.sigmoid(F.linear(hidden_states, layer.gate_weight))  # (B, n, H)
        heads = (heads.unflatten(-1, (-1, layer.head_dim)) * gate[..., None]).flatten(2)
    return layer.out_proj(heads)


def _heads(layer: Projections, rows: Tensor, table: Table | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (B, H_kv, group, n, d), keys (B, H_kv, n, d) and values (B, H_kv, n, d); the table is
    (n, d / 2)."""
    kv_heads = rows.shape[-1] // layer.head_dim // (layer.group + 2)
    rows = rows.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)  # (B, H + 2 H_kv, n, d)
    query, key, value = rows.split([kv_heads * layer.group, kv_heads, kv_heads], dim=1)
    if layer.query_norm is not None and layer.key_norm is not None:
        query, key = layer.query_norm(query), layer.key_norm(key)
    if table is not None:
        query, key = _turned(query, table), _turned(key, table)
    return query.unflatten(1, (kv_heads, layer.group)), key, value


def _turned(rows: Tensor, table: Table) -> Tensor:
    cosine, sine = table
    x, y = rows.chunk(2, dim=-1)
    return torch.cat([x * cosine - y * sine, y * cosine + x * sine], dim=-1)


def _attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """softmax over the allowed keys (n, n), times the values: (B, H, n, d)."""
    logits = query @ key[:, :, None].transpose(-1, -2) / math.sqrt(query.shape[-1])
    weights = logits.masked_fill(~allowed, NEG_INF).softmax(-1)
    return (weights @ value[:, :, None]).flatten(1, 2)


def _global(
    layer: Projections,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    for_onnx: bool,
    choice: dict[str, Tensor] | None,
) -> Tensor:
    """The global route: reference.routed with every block at once, or reference.full."""
    limit = layer.max_exact_blocks
    if limit is None:
        seen = positions <= positions[:, None]  # (n, n)
        return _attend(query, key, value, seen if layer.causal else torch.ones_like(seen))
    block = layer.block
    # more than there are: a tracer takes a size of 1, or none to add, for a rule
    blocks = key.shape[2] // block + 2
    missing = blocks * block - key.shape[2]
    keys, values = (
        F.pad(rows, (0, 0, 0, missing)).flatten(0, 1).unflatten(1, (blocks, block)) for rows in (key, value)
    )  # (R, nb, block, d)
    number = torch.arange(blocks, device=key.device)  # (nb,)
    own = positions[:, None] // block  # (n, 1)
    rows = query.flatten(0, 1)  # (R, group, n, d)
    valid = sizes = None
    others = number < own  # (n, nb) blocks that may be chosen or summed up: complete ones before the own
    if not layer.causal:  # any other one; the last may be shorter, and empty ones are filled up with one 0
        slots = torch.arange(block, device=key.device)
        valid = (number[:, None] * block + slots <= positions[-1]) | (slots == 0)  # (nb, block)
        sizes = valid.sum(1)
        others = (number != own) & (number * block <= positions[-1])
    selected = None if choice is None else choice.get("selected")
    if selected is None:
        selected = _selected(layer, rows, keys, others & (number > 0), for_onnx, valid)  # (R, n, nb)
    if choice is not None:
        choice["selected"] = selected
    in_full = positions[-1] // block + 1 <= limit  # the whole text: nothing is routed
    read = selected | (number == own) | (number == 0) | in_full
    past = Past(key.flatten(0, 1), value.flatten(0, 1), None, None, block, sizes)
    order = layer.routing.far_summary
    if order != "none":
        past = past._replace(far_keys=far_keys(keys, order, valid), far_values=token_mean(values, valid))
    if layer.causal:
        heads = routed_by_mask(rows, past, read, positions)
    else:
        heads = joint_softmax(rows, past, ~read[..., positions // block], read | ~others)
    return heads.unflatten(0, query.shape[:2]).flatten(1, 2)


def _selected(
    layer: Projections,
    query: Tensor,
    keys: Tensor,
    candidates: Tensor,
    for_onnx: bool,
    valid: Tensor | None = None,
) -> Tensor:
    """(R, n, nb), True at the top_k best candidates (n, nb); of equal ones the first, as in
    `router`."""
    routing = layer.routing
    if routing.top_k == 0:
        return torch.zeros_like(candidates).expand(len(query), *candidates.shape)
    features = block_features(keys, routing.router, routing.sub_block, valid)  # (R, nb, parts, f)
    rows = query_features(query, routing.router)
    scores = torch.stack(
        [rows @ features[..., part, :].transpose(-1, -2) for part in range(features.shape[-2])]
    ).amax(0)  # (R, n, nb)
    scores = scores.masked_fill(~candidates, NEG_INF)
    # nb may be below top_k: columns that are no blocks make the sort long enough
    padded = F.pad(scores, (0, routing.top_k), value=NEG_INF)
    if for_onnx:
        place = padded.topk(routing.top_k, dim=-1).indices
    else:
        place = padded.sort(dim=-1, descending=True, stable=True).indices[..., : routing.top_k]
    chosen = torch.zeros_like(padded, dtype=torch.bool).scatter(-1, place, True)
    return chosen[..., : scores.shape[-1]] & candidates
