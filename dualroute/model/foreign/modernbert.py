"""A ModernBERT of Hugging Face as an encoder of ours, equal in every hidden state.

In: its config.json and weights.  Here: every key that changes what is computed is mapped or refused by name;
what its layers have otherwise (LayerNorm, GELU, no norm in front of the first attention, another base of
positions in local layers) goes into `model.parts`.  Out: a `ModelConfig`, and weights under our names, for
:mod:`dualroute.model.foreign.hub`.

ModernBERT normalises its embeddings; as that depends on the token alone, it is done once, in the table.  Its
head for masked tokens (a dense layer, GELU, a norm, a bias) has no counterpart: the encoder comes in, and
masked training or fine-tuning goes on with a head of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dualroute.model.config import ModelConfig, PartsConfig
from dualroute.model.foreign.hf_config import Keys

MODEL_TYPE = "modernbert"
#: Of heads, which stay behind.
HEADS = ("head.", "decoder.", "classifier.")
_ACTIVATIONS = {"gelu": "gelu", "silu": "silu", "swish": "silu"}
_IN_LAYER = {
    "attention_norm.weight": "attn_norm.weight",
    "attention.global_qkv.weight": "attn.Wqkv.weight",
    "attention.local_qkv.weight": "attn.Wqkv.weight",
    "attention.out_proj.weight": "attn.Wo.weight",
    "ffn_norm.weight": "mlp_norm.weight",
    "ffn.down.weight": "mlp.Wo.weight",
}


def modernbert_config(values: dict[str, Any], place: str) -> ModelConfig:
    """The `ModelConfig` of a ModernBERT's config.json.

    Raises:
        UserError: A key asks for something that our model does not compute.
    """
    keys = Keys(values, place)
    activation = str(keys.get("hidden_activation", "gelu"))
    if activation not in _ACTIVATIONS:
        raise keys.refuse("hidden_activation", activation, f"known are {', '.join(_ACTIVATIONS)}")
    for key in ("norm_bias", "attention_bias", "mlp_bias", "quantization_config"):
        if keys.get(key):
            raise keys.refuse(key, keys.get(key), "nothing here has such a part")
    layers, every = keys.need("num_hidden_layers"), max(1, int(keys.get("global_attn_every_n_layers", 3)))
    usual = [
        "full_attention" if index % max(every, 1) == 0 else "sliding_attention" for index in range(layers)
    ]
    kinds = keys.get("layer_types", usual)
    bases = {
        kind: _base(keys, kind, old, default)
        for kind, old, default in (
            ("full_attention", "global_rope_theta", 160_000.0),
            ("sliding_attention", "local_rope_theta", 10_000.0),
        )
    }
    return ModelConfig(
        vocab_size=keys.need("vocab_size"),
        dim=keys.need("hidden_size"),
        num_layers=layers,
        num_heads=keys.need("num_attention_heads"),
        ffn_dim=keys.need("intermediate_size"),
        max_context=keys.need("max_position_embeddings"),
        attention="interleaved",
        causal=False,
        dense_every=min(every, layers),
        window=int(keys.get("local_attention", 128)) // 2 + 1,  # to each side, the token itself counted
        rope_theta=bases["full_attention"],
        norm_eps=float(keys.get("norm_eps", 1e-5)),
        parts=PartsConfig(
            norm="layer",
            activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
            first_norm=False,
            dense_layers=[index for index, kind in enumerate(kinds) if kind == "full_attention"],
            local_rope_theta=bases["sliding_attention"],
        ),
    )


def _base(keys: Keys, kind: str, old: str, default: float) -> float:
    """The base of positions of a kind of layer: ``rope_parameters`` of transformers 5, or one key before."""
    given = (keys.get("rope_parameters") or {}).get(kind) or {}
    if given.get("rope_type", "default") != "default":
        raise keys.refuse("rope_type", given["rope_type"], "supported is default")
    return float(given.get("rope_theta", keys.get(old, default)))


def modernbert_weights(
    wanted: list[str], config: ModelConfig, prefix: str, take: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Weights under our names.

    Args:
        wanted: Our names.
        config: Of the model.
        prefix: Of their names: "model." in front of a head, "" for an encoder alone.
        take: Reads a tensor by their name.
    """
    found: dict[str, Tensor] = {}
    for name in wanted:
        if name == "embedding.weight":
            table = take(f"{prefix}embeddings.tok_embeddings.weight").float()
            scale = take(f"{prefix}embeddings.norm.weight").float()
            found[name] = F.layer_norm(table, (config.dim,), scale, eps=config.norm_eps)
        elif name == "norm.weight":
            found[name] = take(f"{prefix}final_norm.weight")
        else:
            _, layer, rest = name.split(".", 2)
            place = f"{prefix}layers.{layer}"
            if rest in ("ffn.gate.weight", "ffn.up.weight"):  # what is activated, and what it multiplies
                halves = take(f"{place}.mlp.Wi.weight").chunk(2)
                found[name] = halves[0 if rest == "ffn.gate.weight" else 1].clone()
            else:
                found[name] = take(f"{place}.{_IN_LAYER[rest]}")
    return found
