"""The memory of a training by part: what layers keep against autograd, counts against a real model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dualroute.attention import Layout
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.training.config import DataConfig, ParallelConfig, PretrainConfig, TrainConfig
from dualroute.training.finetuning.adapters import add_adapters
from dualroute.training.finetuning.config import StrategyConfig
from dualroute.training.finetuning.freezing import freeze
from dualroute.training.memory.parts import Sizes, layer_bytes, memory_of, sizes_of
from dualroute.training.memory.trained import counted

TOKENS = 512
SHAPE: dict[str, Any] = {
    **{"vocab_size": 8, "dim": 64, "num_layers": 1, "num_heads": 4, "ffn_dim": 160},
    **{"max_context": 4096, "global_mode": "routed", "window": 32, "block": 16, "top_k": 4},
}


def kept_by_autograd(config: ModelConfig, precision: str) -> float:
    """Bytes per token that one layer keeps, without weights, their copies, and the rotary tables, which all
    layers share."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    model = DualRoutingTransformer(config).to(dtype)
    block = model.layers[0]
    rows = torch.randn(1, TOKENS, config.dim, dtype=dtype, requires_grad=True)
    layout = Layout.build(1, TOKENS, config.block).at_positions(None)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    assert config.head_dim is not None
    table = (TOKENS, 1, config.head_dim // 2)

    def pack(saved: torch.Tensor) -> torch.Tensor:
        of_tokens = any(size in (TOKENS, TOKENS // config.block) for size in saved.shape)
        storage = saved.untyped_storage()
        if of_tokens and storage.data_ptr() not in weights and tuple(saved.shape) != table:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(saved)  # or a later tensor could take its place and hide it
        return saved

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved), autocast:
        block(rows, layout=layout)
    return sum(kept.values()) / TOKENS


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"global_mode": "full"},
        {"attention": "dense"},
        {"attention": "local"},
        {"num_kv_heads": 2, "global_heads": 2},
        {"gate": True},
        {"qk_norm": True},
        {"head_dim": 24},
        {"far_summary": "none"},
        {"causal": False},
    ],
    ids=lambda more: ",".join(more) or "plain",
)
def test_what_a_layer_keeps_is_what_autograd_saves(precision: str, more: dict[str, Any]) -> None:
    config = ModelConfig(**{**SHAPE, **more}).resolved()
    counted_bytes = sum(layer_bytes(config.of_layer(0), sizes_of(precision, None), TOKENS))
    assert counted_bytes == pytest.approx(kept_by_autograd(config, precision), rel=0.02)


def run(**sections: Any) -> PretrainConfig:
    model = {**SHAPE, "vocab_size": 100, "num_layers": 4, **sections.pop("model", {})}
    train = TrainConfig(**{"max_steps": 1, "micro_batch": 2, **sections.pop("train", {})})
    data = DataConfig(context=sections.pop("context", 256))
    parallel = ParallelConfig(**sections.pop("parallel", {}))
    strategy = StrategyConfig(**sections.pop("finetune", {}))
    config = PretrainConfig(model=ModelConfig(**model), train=train, data=data)
    return dataclasses.replace(config, parallel=parallel, finetune=strategy)


@pytest.mark.parametrize(
    "strategy",
    [
        {},
        {"freeze": ["embedding", "layers.[01]"]},
        {"adapter": "lora", "rank": 3},
        {"adapter": "lora", "rank": 3, "targets": ["layers.3.ffn"]},
        {"adapter": "dora", "rank": 2, "targets": ["up", "head"]},
    ],
    ids=str,
)
def test_counts_are_those_of_the_model(strategy: dict[str, Any]) -> None:
    if "adapter" in strategy:
        pytest.importorskip("peft")
    config = run(finetune=strategy)
    shape = config.model.resolved()
    if "head" in config.finetune.targets:
        shape = dataclasses.replace(shape, tie_embeddings=False)
    with torch.device("meta"):
        model = DualRoutingTransformer(shape)
        if config.finetune.adapter != "none":
            add_adapters(model, config.finetune, 0)
    freeze(model, config.finetune.freeze)
    count = counted(config)
    assert count.held == sum(p.numel() for p in model.parameters())
    assert count.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_patterns_that_name_nothing() -> None:
    with pytest.raises(UserError, match=r"finetune\.freeze: 'nothing'"):
        counted(run(finetune={"freeze": ["nothing"]}))
    with pytest.raises(UserError, match=r"finetune\.targets: 'nothing' names no linear layer"):
        counted(run(finetune={"adapter": "lora", "targets": ["nothing"]}))
    with pytest.raises(UserError, match="leaves nothing to train"):
        counted(run(finetune={"freeze": ["*"]}))


def test_what_saves_memory_saves_it_and_where() -> None:
    plain = memory_of(run(), 1, "cpu")
    for what in ("feed_forward", "full"):
        less = memory_of(run(train={"activation_checkpointing": what}), 1, "cpu")
        assert less.activations < plain.activations
        assert less.states == plain.states
    half = memory_of(run(train={"precision": "bf16-mixed"}), 1, "cpu")
    assert half.activations < 0.75 * plain.activations
    assert half.weights > plain.weights, "autocast keeps copies of the weights"
    frozen = memory_of(run(finetune={"freeze": ["embedding", "layers.[01]"]}), 1, "cpu")
    assert frozen.optimizer < 0.6 * plain.optimizer
    assert frozen.activations < 0.75 * plain.activations
    shared = memory_of(run(parallel={"sequence_parallel": 2}), 2)
    assert shared.activations == pytest.approx(memory_of(run(), 2).activations / 2)
    third = memory_of(run(parallel={"zero_stage": 3}), 4)
    assert third.weights == plain.weights / 4
    moved = memory_of(
        run(parallel={"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}), 4
    )
    assert moved.states == 0
    with_teacher = memory_of(run(), 1, "cpu", teacher=1e6)
    assert with_teacher.total == plain.total + 1e6


def test_sizes_of_numbers() -> None:
    assert sizes_of("32", 2) == Sizes(4, 4, False)
    assert sizes_of("bf16-mixed", None) == sizes_of("fp8", 0) == Sizes(4, 2, True)
    assert sizes_of("bf16-mixed", 1) == sizes_of("bf16-true", None) == Sizes(2, 2, False)
