"""The model's configuration as transformers knows one.

In: the fields of `ModelConfig`, under the key ``dualroute`` of config.json.  Out: `DualRoutingConfig`, with
    the names that other software looks for (``hidden_size``, ``num_hidden_layers``, …) beside them.

Our fields are kept in a drawer of their own, because transformers takes a ``top_k`` in a model's
configuration for a setting of `generate` and drops it.  Where both tell the same number, the standard name
leads: who changes ``config.num_hidden_layers`` gets as many layers.
"""

from __future__ import annotations

from typing import Any, Literal

from transformers import PretrainedConfig

from dualroute.model.config import STANDARD_NAMES, ModelConfig


class DualRoutingConfig(PretrainedConfig):
    """Configuration of a `DualRoutingModel` and of the models with a head on it.

    Args:
        dualroute: The fields of `ModelConfig`.
        use_cache: Whether a call returns a cache unless it is told; null: where the model is causal.
        initializer_range: Standard deviation of weights that begin at random.
        classifier_dropout: Share of features that the head of a token classifier drops in training.
        pooling: Where a classifier of texts reads its output: at the "last" token, the "first", or over the
            "mean" of all; null: as the model was trained, else the last of a causal model and the first of
            one that reads both sides.
        kwargs: As for `PretrainedConfig`, and the names of :data:`STANDARD_NAMES`, which
            override ``dualroute``.
    """

    model_type = "dualroute"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        dualroute: dict[str, Any] | None = None,
        use_cache: bool | None = None,
        initializer_range: float = 0.02,
        classifier_dropout: float = 0.0,
        pooling: Literal["last", "first", "mean"] | None = None,
        **kwargs: Any,
    ) -> None:
        fields = dict(dualroute or {})
        for name, field in STANDARD_NAMES.items():
            given = kwargs.pop(name, None)
            if given is not None:
                fields[field] = given
        fields = ModelConfig(**fields).resolved().to_dict()
        standard = {name: fields[field] for name, field in STANDARD_NAMES.items()}
        super().__init__(**{"pad_token_id": None, **kwargs, **standard})
        self.dualroute = fields
        causal = fields.get("causal", True)
        trained = (fields.get("task_head") or {}).get("pooling")
        self.use_cache = causal if use_cache is None else use_cache
        self.pooling = pooling or trained or ("last" if causal else "first")
        self.initializer_range = initializer_range
        self.classifier_dropout = classifier_dropout

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in STANDARD_NAMES and "dualroute" in self.__dict__:
            self.dualroute = {**self.dualroute, STANDARD_NAMES[name]: value}

    @property
    def shape(self) -> ModelConfig:
        """What the layers are built from."""
        return ModelConfig(**self.dualroute)
