"""A model that a class of transformers computes as it is: its config.json, and its weights under their names.

In: a model.  Here: a dense one is a Llama, with biases on queries, keys and values a Qwen2, with norms of
queries and keys a Qwen3; one whose heads all read a sliding window is a Mistral.  Queries, keys and values
are parted.  Out: what transformers, vLLM, SGLang, TGI and llama.cpp's converter read without code of ours;
next, :mod:`dualroute.export.hf.folder` writes it and compares it.

The way back is :mod:`dualroute.model.foreign.hub`, whose names these are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.foreign.hub import llama_names

QK_NORM_EPS = 1e-6  # of `Projections`; Qwen3 has one epsilon for all of its norms


def why_not(config: ModelConfig) -> str:
    """Why no class of transformers computes what a model of ``config`` does; "" where one does."""
    if not config.causal:
        return "it reads both directions"
    if config.frontend is not None or config.task_head is not None:
        return "it is no language model"
    if config.attention not in ("dense", "local"):
        return f"its attention is {config.attention}"
    if config.gate:
        return "its heads have gates"
    if len(set(config.layer_ffn_dims or [])) > 1:
        return "its layers have feed-forward widths of their own (layer_ffn_dims)"
    route = "local" if config.attention == "local" else "global"
    factor = getattr(config, f"{route}_rotary_factor")
    if factor != 1:
        return f"RoPE turns {'a part' if factor else 'none'} of its heads ({route}_rotary_factor {factor:g})"
    if config.attention == "local":
        if len(set(config.layer_windows or [])) > 1:
            return "its layers have windows of their own (layer_windows)"
        if config.qkv_bias or config.qk_norm:
            return "a Mistral has a sliding window, and neither qkv_bias nor qk_norm"
    if config.qkv_bias and config.qk_norm:
        return "no class has both qkv_bias and qk_norm"
    if config.qk_norm and config.norm_eps != QK_NORM_EPS:
        return f"norms of queries and keys have epsilon {QK_NORM_EPS:g} and the others {config.norm_eps:g}"
    return ""


def family(config: ModelConfig) -> tuple[str, str]:
    """model_type and class of a model that :func:`why_not` has nothing against."""
    if config.attention == "local":
        return "mistral", "MistralForCausalLM"
    if config.qkv_bias:
        return "qwen2", "Qwen2ForCausalLM"
    return ("qwen3", "Qwen3ForCausalLM") if config.qk_norm else ("llama", "LlamaForCausalLM")


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of the model itself."""
    config = config.resolved()
    kind, name = family(config)
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "linear" if len(config.rope_scaling) == 1 else "llama3", **config.rope_scaling}
    window = (config.layer_windows or [config.window])[0] if config.attention == "local" else None
    return {
        "architectures": [name],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dims[0],
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
        "attention_dropout": 0.0,
        # said in both ways: rope_parameters is transformers 5's, the others are what older software reads
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        **({"sliding_window": window} if kind == "mistral" else {}),
        **({"use_sliding_window": False} if kind.startswith("qwen") else {}),
        **({"attention_bias": False} if kind in ("llama", "qwen3") else {}),
        **({"mlp_bias": False} if kind == "llama" else {}),
    }


def named_weights(model: DualRoutingTransformer) -> dict[str, Tensor]:
    """The parameters under the names of transformers; a tied head is left out."""
    config = model.config
    assert config.head_dim is not None
    assert config.num_kv_heads is not None
    rows = [config.num_heads * config.head_dim, *[config.num_kv_heads * config.head_dim] * 2]
    weights: dict[str, Tensor] = {}
    for name, value in model.named_parameters():
        theirs = llama_names(name)
        parts = [value] if len(theirs) == 1 else [part.contiguous() for part in value.split(rows)]
        weights.update(zip(theirs, parts, strict=True))
    return weights
