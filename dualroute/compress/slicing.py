"""Cutting a model down to the parts that stay.

In: a model, :class:`~dualroute.compress.importance.Kept`, and the statistics of its calibration.  Out:
another :class:`DualRoutingTransformer` with a smaller :class:`ModelConfig`.

Two corrections make up for what is cut, both closed forms, no training:

    columns of a projection W whose inputs a_S stay:  W' = W G[:, S] (G[S, S] + λI)⁻¹,  G = E[a aᵀ]
        the least-squares fit of W a by the inputs that are left (as in optimal brain compression,
        Frantar & Alistarh 2022, https://arxiv.org/abs/2208.11580, for a whole set of inputs at once)
    weight of an RMSNorm:  w' = w_S · √(mean E[x_S²] / mean E[x²])
        so that its outputs keep their size though the mean now runs over fewer channels

The pruned model is an ordinary one.  Nothing that loads, trains or serves it knows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dualroute.compress.calibration import Statistics
from dualroute.compress.importance import Kept
from dualroute.model import DualRoutingTransformer, ModelConfig

RIDGE = 1e-3  # λ, as a share of the mean of G's diagonal


@torch.no_grad()
def slice_model(
    model: DualRoutingTransformer, kept: Kept, statistics: Statistics | None
) -> DualRoutingTransformer:
    """A new model of what ``kept`` names; with ``statistics`` the weights that stay are corrected.

    Returns:
        On the CPU, float32, in evaluation mode.  ``model`` is left as it was.
    """
    small = DualRoutingTransformer(_config(model.config, kept))
    weights = {name: value.detach().float().cpu() for name, value in model.named_parameters()}
    new: dict[str, Tensor] = dict(small.named_parameters())
    channels = kept.channels

    def norm(old_name: str, new_name: str) -> None:
        factor = 1.0
        if statistics is not None:
            energy = statistics.norm_inputs[old_name].cpu()
            factor = float((energy[channels].mean() / energy.mean()).sqrt())
        new[f"{new_name}.weight"].copy_(weights[f"{old_name}.weight"][channels] * factor)

    new["embedding.weight"].copy_(weights["embedding.weight"][:, channels])
    if "head.weight" in new:
        new["head.weight"].copy_(weights["head.weight"][:, channels])
    if "task_head.project.weight" in new:
        new["task_head.project.weight"].copy_(weights["task_head.project.weight"][:, channels])
        new["task_head.project.bias"].copy_(weights["task_head.project.bias"])
    norm("norm", "norm")
    for number, index in enumerate(kept.layers):
        old, to = f"layers.{index}", f"layers.{number}"
        norm(f"{old}.attention_norm", f"{to}.attention_norm")
        norm(f"{old}.ffn_norm", f"{to}.ffn_norm")
        of_layer = statistics.layers[index] if statistics is not None else None
        ffn = kept.ffn[number]
        for name in ("gate", "up"):
            new[f"{to}.ffn.{name}.weight"].copy_(weights[f"{old}.ffn.{name}.weight"][ffn][:, channels])
        down = weights[f"{old}.ffn.down.weight"][channels]
        new[f"{to}.ffn.down.weight"].copy_(_columns(down, ffn, of_layer.ffn_gram if of_layer else None))
        _slice_attention(
            model.layers[index].attention,
            weights,
            new,
            f"{old}.attention",
            f"{to}.attention",
            (kept.global_groups[number], kept.local_groups[number]),
            channels,
            of_layer.heads_gram if of_layer else None,
        )
    return small.eval()


def _slice_attention(
    attention: Any,
    weights: dict[str, Tensor],
    new: dict[str, Tensor],
    old_name: str,
    new_name: str,
    groups: tuple[Tensor, Tensor],
    channels: Tensor,
    gram: Tensor | None,
) -> None:
    """Rows of each route's queries, keys and values; columns of the output projection."""
    group, dim = attention.group, attention.head_dim
    heads, before = [], 0
    routes = (("global_qkv", attention.global_heads), ("local_qkv", attention.local_heads))
    for (route, num_heads), kept in zip(routes, groups, strict=True):
        if not num_heads:
            continue
        queries = (kept[:, None] * group + torch.arange(group)).flatten()
        keys = num_heads + kept
        values = num_heads + num_heads // group + kept
        rows = _of_heads(torch.cat([queries, keys, values]), dim)
        new[f"{new_name}.{route}.weight"].copy_(weights[f"{old_name}.{route}.weight"][rows][:, channels])
        if f"{new_name}.{route}.bias" in new:
            new[f"{new_name}.{route}.bias"].copy_(weights[f"{old_name}.{route}.bias"][rows])
        heads.append(before + queries)
        before += num_heads
    kept_heads = torch.cat(heads)
    out = weights[f"{old_name}.out_proj.weight"][channels]
    new[f"{new_name}.out_proj.weight"].copy_(_columns(out, _of_heads(kept_heads, dim), gram))
    if f"{new_name}.gate_weight" in new:
        new[f"{new_name}.gate_weight"].copy_(weights[f"{old_name}.gate_weight"][kept_heads][:, channels])
    for name in ("query_norm", "key_norm"):
        if f"{new_name}.{name}.weight" in new:
            new[f"{new_name}.{name}.weight"].copy_(weights[f"{old_name}.{name}.weight"])


def _of_heads(heads: Tensor, head_dim: int) -> Tensor:
    """Channels of whole heads."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _columns(weight: Tensor, kept: Tensor, gram: Tensor | None) -> Tensor:
    """Columns ``kept`` of ``weight``, refitted by the inputs' Gram matrix."""
    if gram is None or len(kept) == weight.shape[1]:
        return weight[:, kept]
    gram = gram.double().cpu()
    among = gram[kept][:, kept]
    among += RIDGE * among.diagonal().mean() * torch.eye(len(kept), dtype=gram.dtype)
    return torch.linalg.solve(among, gram[kept] @ weight.double().T).T.to(weight.dtype)


def _config(config: ModelConfig, kept: Kept) -> ModelConfig:
    """The smaller configuration, all widths written out."""
    group = config.heads_per_group
    with_global = 0 if config.global_layers is None else config.global_layers[0]
    groups = [len(kept.global_groups[with_global]), len(kept.local_groups[with_global])]
    if config.attention == "interleaved":  # each layer has one route, with all of its heads
        counts = {len(g) + len(local) for g, local in zip(kept.global_groups, kept.local_groups, strict=True)}
        groups = [counts.pop(), 0]
    dual = config.attention == "dual"
    of_layers = {
        name: None if values is None else [values[index] for index in kept.layers]
        for name, values in (("layer_windows", config.layer_windows), ("layer_top_k", config.layer_top_k))
    }
    widths = [len(ffn) for ffn in kept.ffn]
    return dataclasses.replace(
        config,
        num_layers=len(kept.layers),
        dim=len(kept.channels),
        ffn_dim=max(widths),
        layer_ffn_dims=widths if len(set(widths)) > 1 else None,
        num_heads=sum(groups) * group,
        num_kv_heads=sum(groups),
        global_heads=groups[0] * group if dual else None,
        local_heads=groups[1] * group if dual else None,
        layer_windows=of_layers["layer_windows"],
        layer_top_k=of_layers["layer_top_k"],
    ).resolved()
