"""Tiny checkpoints of every kind, and transformers kept off the network."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="modules-"))  # read when imported

from dualroute.evaluate.load import Loaded, load
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import Checkpoint, save_model

TINY = {
    "dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "max_context": 192,
    "window": 10,
    "block": 8,
    "sub_block": 4,
    "top_k": 2,
    "global_mode": "routed",
}
#: Every kind of model there is, by name: what differs from TINY
KINDS = {
    "dual": {},
    "dense": {"attention": "dense"},
    "local": {"attention": "local"},
    "interleaved": {"attention": "interleaved", "dense_every": 2},
    "gqa": {"num_heads": 8, "num_kv_heads": 4, "qk_norm": True},
    "gate": {"gate": True, "qk_norm": True, "global_heads": 3},
    "layers": {"layer_windows": [4, 30], "layer_top_k": [1, 4], "layer_ffn_dims": [40, 96]},
    "global_layers": {"global_layers": [1]},
    "untied": {"tie_embeddings": False, "head_dim": 6, "norm_eps": 1e-3},
    "moment": {"router": "moment", "far_summary": "first_order", "rope_theta": 500.0},
    "mean": {"router": "mean", "far_summary": "none"},
    "full": {"global_mode": "full"},
    "auto": {"global_mode": "auto"},
    "no_top_k": {"top_k": 0},
    "no_positions": {"global_rotary_factor": 0.0},
    "one_choice": {"num_layers": 3, "share_choice": 3},
    "similar_keys": {"cluster_span": 16},
    "partial": {"global_rotary_factor": 0.5, "local_rotary_factor": 0.25, "rope_scaling": {"factor": 4.0}},
    "bias": {"qkv_bias": True, "rope_scaling": {"factor": 4.0}},
    "llama3": {
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def tiny_model(vocab_size: int = 320, **options) -> DualRoutingTransformer:
    """A random model whose attention is not nearly uniform, so that choices matter."""
    torch.manual_seed(0)
    model = DualRoutingTransformer(ModelConfig(**{**TINY, "vocab_size": vocab_size, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def checkpoint(tiny_dataset: Path, tmp_path: Path) -> Callable[..., Checkpoint]:
    """Write a tiny checkpoint: `checkpoint(**options of ModelConfig)`."""

    def write(**options) -> Checkpoint:
        metadata = {"step": 7, "tokens": 1234, "val_loss": 3.5, "context": 64}
        return save_model(tiny_model(**options), tmp_path / "c", tiny_dataset / "tokenizer.model", metadata)

    return write


@pytest.fixture
def loaded(checkpoint: Callable[..., Checkpoint]) -> Callable[..., Loaded]:
    """The same, loaded: `loaded(dtype="float32", **options of ModelConfig)`."""

    def make(dtype: str = "float32", **options) -> Loaded:
        return load(checkpoint(**options).folder, "cpu", dtype)

    return make
