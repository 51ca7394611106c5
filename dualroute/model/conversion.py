"""A dense model becomes a dual one: its heads are divided between the routes, or given to both.

In: a dense `DualRoutingTransformer` (a Llama from :mod:`dualroute.model.foreign.hub`, or a checkpoint of
ours) and token ids.  Here: how far each head looks is measured; weights are rearranged.  Out: the dual
model, whose training goes on with distillation from the original ("healing").

- ``divide``: whole KV groups (query heads and the key head they share) go to one route each.  Parameters and
  their number stay as they are; rows and columns change places.
- ``both``: either route starts from all heads, y = (global + local) / 2 by halves of the output projection.

With a window as long as the text and exact global attention, both are the dense model
again, to the last rounding.  All that conversion loses, it loses through what a route does not read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dualroute.attention import DualRouting, Layout
from dualroute.errors import UserError
from dualroute.model.config import ModelConfig
from dualroute.model.layers import TransformerBlock
from dualroute.model.transformer import DualRoutingTransformer

_QUERY_ROWS = 128  # queries whose probabilities exist at once


@torch.no_grad()
def mass_beyond(
    model: DualRoutingTransformer, batches: Iterable[Mapping[str, Tensor]], window: int
) -> Tensor:
    """How much of its attention each head spends outside of a window.

    Args:
        model: A dense model.
        batches: ``input_ids`` (B, n) and, where rows hold several documents, ``segment_ids`` (B, n).
        window: Keys of the window, the token's own included.

    Returns:
        (layers, heads) mean probability of keys at a distance of ``window`` or more, over the tokens that
        have such keys.

    Raises:
        UserError: No text is longer than the window.
    """
    device = model.embedding.weight.device
    config = model.config
    sums = torch.zeros(config.num_layers, config.num_heads, dtype=torch.float64, device=device)
    tokens = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        ids, segments = batch["input_ids"].to(device), batch.get("segment_ids")
        segments = None if segments is None else segments.to(device)
        padding = None if segments is None else segments != 0
        layout = Layout.build(ids.shape[0], ids.shape[1], config.block, segments, padding, device)
        tokens += ((layout.positions >= window) & (layout.documents >= 0)).sum()
        hidden = model.embedding(ids)
        for number, layer in enumerate(model.layers):
            assert isinstance(layer, TransformerBlock)
            sums[number] += _far_mass(layer.attention, layer.attention_norm(hidden), layout, window)
            hidden = layer(hidden, layout=layout)
    if not tokens:
        raise UserError(f"no calibration text is longer than window {window}: nothing lies beyond it")
    return (sums / tokens).cpu()


def _far_mass(attention: DualRouting, hidden_states: Tensor, layout: Layout, window: int) -> Tensor:
    """(H,) sum over all tokens of the probability beyond the window."""
    assert attention.global_qkv is not None
    query, key, _ = attention.stream_heads(
        attention.global_qkv, attention.global_rope, hidden_states, layout, None, False
    )
    # back from the stream to the batch: (H, B, n, d)
    query, key = (
        layout.from_stream(rows.transpose(0, 1).flatten(1))
        .unflatten(2, (-1, attention.head_dim))
        .movedim(2, 0)
        for rows in (query, key)
    )
    key = key.repeat_interleave(attention.group, 0)
    total = torch.zeros(len(query), dtype=torch.float64, device=query.device)
    place = torch.arange(layout.length, device=query.device)
    for first in range(0, layout.length, _QUERY_ROWS):
        part = slice(first, first + _QUERY_ROWS)
        distance = place[part, None] - place
        same = layout.documents[:, part, None] == layout.documents[:, None, :]  # (B, rows, n)
        logits = query[:, :, part] @ key.transpose(-1, -2) / math.sqrt(attention.head_dim)
        weights = logits.float().masked_fill(~(same & (distance >= 0)), -math.inf).softmax(-1)
        far = (distance >= window) & (layout.documents[:, part, None] >= 0)
        total += weights.masked_fill(~far, 0).sum((1, 2, 3)).double()
    return total


def attention_layers(model: DualRoutingTransformer) -> list[DualRouting]:
    """The attention of each layer."""
    return [layer.attention for layer in model.layers]  # type: ignore[misc]


def nearest_groups(mass: Tensor, group: int, count: int) -> list[list[int]]:
    """In each layer, the ``count`` KV groups that look beyond the window least.

    Args:
        mass: (layers, heads) of :func:`mass_beyond`.
        group: Query heads per KV group.
        count: KV groups wanted.
    """
    of_group = mass.unflatten(1, (-1, group)).mean(2)
    order = of_group.argsort(dim=1, stable=True)
    return [sorted(row[:count].tolist()) for row in order]


def random_groups(layers: int, groups: int, count: int, seed: int) -> list[list[int]]:
    """The control: as many, drawn by lot."""
    generator = torch.Generator().manual_seed(seed)
    return [sorted(torch.randperm(groups, generator=generator)[:count].tolist()) for _ in range(layers)]


def check_dense(config: ModelConfig) -> None:
    """Refuse what is not dense in every layer.

    Raises:
        UserError: Naming ``attention``.
    """
    if config.attention != "dense":
        raise UserError(
            f"the source has attention '{config.attention}': only a dense model is converted to a dual one"
        )


def divide_heads(
    model: DualRoutingTransformer, config: ModelConfig, local_groups: Sequence[Sequence[int]]
) -> DualRoutingTransformer:
    """A dual model whose routes share the heads of a dense one.

    Args:
        model: The dense model; its tensors are copied.
        config: Of the dual model; differs in routes and windows only.
        local_groups: KV groups that become local, for each layer; in one without a global route all do.

    Raises:
        UserError: The model is not dense.
    """
    check_dense(model.config)
    dual = _skeleton(model, config)
    for source, target, local in zip(
        attention_layers(model), attention_layers(dual), local_groups, strict=True
    ):
        groups = range(source.global_heads // source.group)
        if not target.global_heads:  # a layer outside of global_layers
            local = groups
        order = [g for g in groups if g not in set(local)], list(local)
        _fill(target, source, order, share=1.0)
    return dual


def double_heads(model: DualRoutingTransformer, config: ModelConfig) -> DualRoutingTransformer:
    """A dual model of which each route begins with all heads of a dense one.

    Args:
        model: The dense model; its tensors are copied.
        config: Of the dual model, with global_heads = local_heads = num_heads.

    Raises:
        UserError: The model is not dense.
    """
    check_dense(model.config)
    dual = _skeleton(model, config)
    for source, target in zip(attention_layers(model), attention_layers(dual), strict=True):
        every = list(range(source.global_heads // source.group))
        if target.global_heads:
            _fill(target, source, (every, every), share=0.5)
        else:  # a layer outside of global_layers
            _fill(target, source, ([], every), share=1.0)
    return dual


def _skeleton(model: DualRoutingTransformer, config: ModelConfig) -> DualRoutingTransformer:
    """A model of ``config`` with everything but the attention copied."""
    with torch.device("meta"):
        dual = DualRoutingTransformer(config)
    dual.to_empty(device="cpu")
    dual.to(model.embedding.weight.dtype)
    if config.tie_embeddings:
        dual.head.weight = dual.embedding.weight  # to_empty has parted them
    ours = dict(dual.named_parameters())
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".attention." not in name or name.endswith("_norm.weight"):
                ours[name].copy_(value)
    return dual.eval()


@torch.no_grad()
def _fill(target: DualRouting, source: DualRouting, order: tuple[list[int], list[int]], share: float) -> None:
    """Give the routes of ``target`` the KV groups in ``order`` (global, local) of ``source``."""
    group, head_dim = source.group, source.head_dim
    for projection, groups in zip((target.global_qkv, target.local_qkv), order, strict=True):
        if not groups:
            continue
        assert source.global_qkv is not None
        assert projection is not None
        projection.weight.copy_(_taken(source.global_qkv.weight, groups, group, head_dim))
        if source.global_qkv.bias is not None:
            projection.bias.copy_(_taken(source.global_qkv.bias, groups, group, head_dim))
    heads = [g * group + i for g in order[0] + order[1] for i in range(group)]
    columns = source.out_proj.weight.unflatten(1, (-1, head_dim))[:, heads]
    target.out_proj.weight.copy_(columns.flatten(1) * share)
    if source.gate_weight is not None and target.gate_weight is not None:
        target.gate_weight.copy_(source.gate_weight[heads])


def _taken(rows: Tensor, groups: list[int], group: int, head_dim: int) -> Tensor:
    """Of joined rows [queries, keys, values], those of the given KV groups."""
    heads = rows.unflatten(0, (-1, head_dim))
    kv_heads = heads.shape[0] // (group + 2)
    query, key, value = heads.split([kv_heads * group, kv_heads, kv_heads])
    query = query.unflatten(0, (kv_heads, group))[groups].flatten(0, 1)
    return torch.cat([query, key[groups], value[groups]]).flatten(0, 1)


def dual_config(
    config: ModelConfig, *, both: bool, local_heads: int | None, **routing: object
) -> ModelConfig:
    """The configuration of the dual model.

    Args:
        config: Of the dense model.
        both: Each route has all heads.
        local_heads: Heads of the local route otherwise; null means half, rounded down to whole KV groups.
        routing: Values of window, block, top_k, global_mode and the like; null keeps the dense model's.

    Raises:
        UserError: The values contradict each other.
    """
    dense = config.resolved()
    assert dense.num_kv_heads is not None
    group = dense.heads_per_group
    if both:
        heads = {"global_heads": dense.num_heads, "local_heads": dense.num_heads}
    else:
        if dense.num_kv_heads < 2:
            raise UserError(
                "the source has one key/value head, which two routes cannot divide: use --heads both"
            )
        local = dense.num_kv_heads // 2 * group if local_heads is None else local_heads
        if not 0 < local < dense.num_heads or local % group:
            raise UserError(
                f"local_heads is {local}: give a multiple of the {group} query heads that share a key head, "
                f"above 0 and below {dense.num_heads}"
            )
        heads = {"global_heads": dense.num_heads - local, "local_heads": local}
    chosen = {name: value for name, value in routing.items() if value is not None}
    positions = {"local_rotary_factor": dense.global_rotary_factor}  # heads that become local keep theirs
    return dataclasses.replace(dense, attention="dual", **heads, **positions, **chosen).resolved()  # type: ignore[arg-type]
