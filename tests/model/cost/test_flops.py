"""Shapes and operations from a configuration alone: those of the model itself, and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.config import PartsConfig
from dualroute.model.cost.flops import keys_read, routed, training_flops
from dualroute.model.cost.shapes import parameter_shapes
from dualroute.model.ends_config import FrontendConfig, TaskHeadConfig

BASE: dict[str, Any] = {"vocab_size": 97, "dim": 64, "num_layers": 3, "num_heads": 4}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"attention": "dense"},
        {"attention": "local"},
        {"attention": "interleaved", "dense_every": 2},
        {"gate": True, "qk_norm": True, "qkv_bias": True, "num_kv_heads": 2},
        {"tie_embeddings": False, "global_layers": [1]},
        {"layer_ffn_dims": [64, 16, 80]},
        {"causal": False, "global_heads": 1, "local_heads": 3},
        {"head_dim": 24, "ffn_dim": 100},
        {"task_head": TaskHeadConfig("token", ["a", "b"]), "tie_embeddings": False},
        {
            "frontend": FrontendConfig("patches", 12, [4, 4], [2, 2], True),
            "task_head": TaskHeadConfig("sequence", ["a", "b"]),
            "causal": False,
            "block": 4,
            "sub_block": 4,
            "head_dim": 16,
        },
        {"causal": False, "parts": PartsConfig(norm="layer", first_norm=False)},
    ],
    ids=lambda more: ",".join(more) or "plain",
)
def test_names_and_shapes_are_those_of_the_model(more: dict[str, Any]) -> None:
    config = ModelConfig(**{**BASE, **more})
    with torch.device("meta"):
        model = DualRoutingTransformer(config)
    assert parameter_shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_operations_by_hand() -> None:
    config = ModelConfig(
        **BASE, block=8, sub_block=4, top_k=2, window=4, global_mode="routed", far_summary="first_order"
    ).resolved()
    layer, context = config.of_layer(0), 64
    assert (layer.global_heads, layer.local_heads, config.head_dim) == (2, 2, 16)
    # of a global head: sink, two chosen blocks, half of the own one; of a local one: 4 but at the beginning
    assert keys_read(layer, context) == (2 * 3.5 * 8, 2 * (4 - 4 * 3 / 128))
    found = training_flops(config, context)
    shapes = parameter_shapes(config)
    layers = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name != "embedding.weight")
    assert found.layers == 6 * layers
    assert found.head == 6 * 97 * 64
    assert found.global_route == 12 * 16 * 3 * 56
    # 32 past tokens, two bounds for each 4 of them; of a far block of 8 two products, and their gradients
    assert found.router == 16 * 3 * 2 * 32 * 4 / 4
    assert found.summary == 3 * 16 * 3 * 2 * 32 * 4 / 8
    assert found.total == found.of_model + found.router + found.summary
    short = training_flops(config, 32)
    assert (short.router, short.summary) == (0, 0), "a document of top_k + 2 blocks is read in full"


def test_which_documents_are_routed() -> None:
    layer = ModelConfig(
        **BASE, block=8, sub_block=4, top_k=2, global_mode="auto", auto_break_even=100
    ).of_layer(0)
    assert not routed(layer, 96)
    assert routed(layer, 97)
    assert not routed(ModelConfig(**BASE, attention="dense").of_layer(0), 10**6)
