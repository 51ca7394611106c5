"""The model's configuration as transformers knows one.

In: the fields of `ModelConfig`, under the key ``dualroute`` of config.json.  Out: `DualRoutingConfig`, with
    the names that other software looks for (``hidden_size``, ``num_hidden_layers``, …) derived from them.

Our fields are kept in a drawer of their own, because transformers takes a ``top_k`` in a
model's configuration for a setting of `generate` and drops it.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from dualroute.model.config import ModelConfig


class DualRoutingConfig(PretrainedConfig):
    """Configuration of a `DualRoutingForCausalLM`.

    Args:
        dualroute: The fields of `ModelConfig`.
        kwargs: As for `PretrainedConfig`.  ``vocab_size`` overrides the model's (after the embedding was
            resized); the other standard names follow from ``dualroute``.
    """

    model_type = "dualroute"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(self, dualroute: dict[str, Any] | None = None, **kwargs: Any) -> None:
        shape = ModelConfig(**(dualroute or {})).resolved()
        standard = {
            "vocab_size": kwargs.pop("vocab_size", None) or shape.vocab_size,
            "hidden_size": shape.dim,
            "intermediate_size": shape.ffn_dim,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "max_position_embeddings": shape.max_context,
            "rms_norm_eps": shape.norm_eps,
            "tie_word_embeddings": shape.tie_embeddings,
        }
        self.dualroute = shape.to_dict()
        super().__init__(**{"use_cache": True, **kwargs, **standard})

    @property
    def shape(self) -> ModelConfig:
        """What `DualRoutingTransformer` is built from."""
        return ModelConfig(**{**self.dualroute, "vocab_size": self.vocab_size})
