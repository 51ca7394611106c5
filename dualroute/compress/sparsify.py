"""``dualroute sparsify``: single weights set to zero, for research.

In: a checkpoint, and calibration shards for Wanda.  Out: the same model, saved dense, with zeros in the
weights of its layers; embedding and head are left alone.

    magnitude    the smallest |W_ij| of each output row
    wanda        the smallest |W_ij| · √E[x_j²] of each output row (Sun et al. 2024, eq. 1,
                 https://arxiv.org/abs/2306.11695)

This makes nothing faster or smaller.  Kernels that skip zeros are gone from torchao and
vLLM; structured pruning (``dualroute prune``) and quantisation are what ships.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dualroute.compress.calibration import Statistics, calibrate, described, measure
from dualroute.compress.config import SparsifyConfig
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer
from dualroute.model.checkpoint.format import save_model


def sparsify(config: SparsifyConfig) -> None:
    """Zero weights, save, and say what it costs.

    Raises:
        UserError: The inputs do not fit together.
    """
    found = calibrate(config)
    loaded, batches = found.loaded, found.batches
    before = found.loss(loaded.model, batches)
    statistics = measure(loaded.model, batches, loaded.device) if config.method == "wanda" else None
    zero_weights(loaded.model, statistics, config.sparsity, config.pattern)
    after = found.loss(loaded.model, batches)
    sparsity = {"method": config.method, "share": config.sparsity, "pattern": config.pattern}
    metadata = described(loaded, "sparsify", sparsified_from=str(loaded.checkpoint.folder), sparsity=sparsity)
    extra = loaded.checkpoint.task_file()
    save_model(loaded.model.cpu(), config.output, loaded.tokenizer.path, metadata, extra)
    print(
        f"{config.output}: {config.sparsity:.0%} of the layers' weights are 0 ({config.method}, "
        f"{config.pattern}); calibration loss {before:.4f} → {after:.4f}.  Saved dense: no smaller, no faster"
    )


@torch.no_grad()
def zero_weights(
    model: DualRoutingTransformer, statistics: Statistics | None, sparsity: float, pattern: str
) -> None:
    """Zero weights of every layer's projections in place; ``statistics`` null goes by magnitude alone.

    Raises:
        UserError: A width is no multiple of 4, as pattern 2:4 needs.
    """
    for name, linear, energy in _projections(model, statistics):
        scores = linear.weight.abs().float()  # (out, in)
        if energy is not None:
            scores = scores * energy.sqrt()
        if pattern == "2:4":
            if linear.in_features % 4:
                raise UserError(f"{name} has {linear.in_features} inputs: pattern 2:4 needs a multiple of 4")
            groups = scores.unflatten(1, (-1, 4))
            zeros = torch.zeros_like(groups, dtype=torch.bool)
            zeros.scatter_(2, groups.topk(2, dim=2, largest=False).indices, True)
            zeros = zeros.flatten(1)
        else:
            zeros = torch.zeros_like(scores, dtype=torch.bool)
            fewest = scores.topk(round(sparsity * scores.shape[1]), dim=1, largest=False).indices
            zeros.scatter_(1, fewest, True)
        linear.weight[zeros] = 0


def _projections(
    model: DualRoutingTransformer, statistics: Statistics | None
) -> Iterator[tuple[str, nn.Linear, Tensor | None]]:
    """Every projection of the layers, with E[x²] (in,) of its inputs."""
    for index, layer in enumerate(model.layers):
        block: Any = layer
        energies: dict[str, Tensor] = {}
        if statistics is not None:
            of_layer = statistics.layers[index]
            attention_inputs = statistics.norm_outputs[f"layers.{index}.attention_norm"]
            ffn_inputs = statistics.norm_outputs[f"layers.{index}.ffn_norm"]
            energies = {
                "attention.global_qkv": attention_inputs,
                "attention.local_qkv": attention_inputs,
                "attention.out_proj": of_layer.heads_gram.diagonal(),
                "ffn.gate": ffn_inputs,
                "ffn.up": ffn_inputs,
                "ffn.down": of_layer.ffn_gram.diagonal(),
            }
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                yield f"layers.{index}.{name}", module, energies.get(name)
