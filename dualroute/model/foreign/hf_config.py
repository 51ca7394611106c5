"""A Hugging Face ``config.json`` of the Llama family as a `ModelConfig`, or the reason why it cannot be one.

In: the parsed config.json of a Llama, Mistral, Qwen2 or Qwen3 model.  Here: every key that changes what is
computed is either mapped or refused by name; keys that steer training or caching are passed over.  Next:
:mod:`dualroute.model.foreign.hub` fills the model with the weights.

A Mistral with a sliding window is exactly our ``attention: local``; the window counts
the token itself in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dualroute.errors import UserError
from dualroute.model.config import ModelConfig

#: model_type → does it have a bias on queries, keys and values of its own accord?
LLAMA_LIKE = {"llama": False, "mistral": False, "qwen2": True, "qwen3": False}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Keys:
    """config.json with its place, for messages."""

    values: dict[str, Any]
    place: str

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def need(self, key: str) -> int:
        value = self.values.get(key)
        if not isinstance(value, int):
            raise UserError(f"{self.place}: key '{key}' is {value!r}: a whole number is needed there")
        return value

    def refuse(self, key: str, value: Any, reason: str) -> UserError:
        return UserError(f"{self.place}: {key} {value!r} cannot be read: {reason}")


def llama_like_config(values: dict[str, Any], place: str) -> ModelConfig:
    """The `ModelConfig` of a Llama, Mistral, Qwen2 or Qwen3 config.json.

    Args:
        values: The parsed file.
        place: Its path, for messages.

    Raises:
        UserError: A key asks for something that our model does not compute.
    """
    keys = Keys(values, place)
    family = values["model_type"]
    _refuse_what_differs(keys)
    theta, scaling = _rope(keys)
    heads = keys.need("num_attention_heads")
    window = _window(keys, family)
    qk_norm = family == "qwen3"
    eps = float(keys.get("rms_norm_eps", 1e-6))
    if qk_norm and eps != 1e-6:
        raise keys.refuse("rms_norm_eps", eps, "norms of queries and keys use 1e-06 here")
    return ModelConfig(
        vocab_size=keys.need("vocab_size"),
        dim=keys.need("hidden_size"),
        num_layers=keys.need("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=keys.get("num_key_value_heads", heads),
        head_dim=keys.get("head_dim"),
        ffn_dim=keys.need("intermediate_size"),
        max_context=keys.need("max_position_embeddings"),
        attention="dense" if window is None else "local",
        window=ModelConfig.window if window is None else window,
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=LLAMA_LIKE[family],
        qk_norm=qk_norm,
        tie_embeddings=bool(keys.get("tie_word_embeddings", False)),
        norm_eps=eps,
    )


def _refuse_what_differs(keys: Keys) -> None:
    if keys.get("hidden_act", "silu") not in ("silu", "swish"):
        raise keys.refuse("hidden_act", keys.get("hidden_act"), "the feed-forward here is SwiGLU (silu)")
    for key, reason in (
        ("attention_bias", "it puts a bias on the attention's output projection, which has none here"),
        ("mlp_bias", "the feed-forward here has no bias"),
        ("quantization_config", "give the unquantized weights"),
    ):
        if keys.get(key):
            raise keys.refuse(key, keys.get(key), reason)


def _window(keys: Keys, family: str) -> int | None:
    """Keys that every layer sees; None = all."""
    layers = keys.need("num_hidden_layers")
    window: int | None
    if family == "mistral":
        window = keys.values.get("sliding_window", 4096)  # null is none, and left out it is 4096
        sliding = layers if window else 0
    else:
        window = keys.get("sliding_window") if keys.get("use_sliding_window", False) else None
        first = keys.get("max_window_layers", 28)
        sliding = max(0, layers - first) if window else 0
    types = keys.get("layer_types")
    if types is not None:
        sliding = types.count("sliding_attention")
    if window is None or sliding == 0 or window >= keys.need("max_position_embeddings"):
        return None
    if sliding < layers:
        raise keys.refuse(
            "sliding_window", window, f"only {sliding} of {layers} layers have it; all of them or none can"
        )
    return window


def _rope(keys: Keys) -> tuple[float, dict[str, float] | None]:
    """Base and scaling: ``rope_parameters`` of transformers 5, or rope_theta and rope_scaling before it."""
    given = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    theta = float(given.get("rope_theta", keys.get("rope_theta", 10000.0)))
    fraction = given.get("partial_rotary_factor", keys.get("partial_rotary_factor", 1.0))
    if fraction != 1.0:
        raise keys.refuse("partial_rotary_factor", fraction, "all channels of a head are turned here")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise keys.refuse("rope_type", kind, "supported are default, linear and llama3")
    wanted = ("factor",) if kind == "linear" else _LLAMA3
    missing = [key for key in wanted if key not in given]
    if missing:
        raise UserError(f"{keys.place}: rope_type {kind} lacks {', '.join(missing)}")
    return theta, {key: float(given[key]) for key in wanted}
