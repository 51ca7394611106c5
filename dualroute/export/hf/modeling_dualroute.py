"""A DualRouting model as transformers' models are: a backbone, and heads on it.

In: token ids or their embeddings, images or frames of sound, with an attention mask where a
    batch is padded.  Out: hidden states (`DualRoutingModel`), logits and a loss (`DualRoutingFor…`).  The
    layers are those of :mod:`dualroute.model.layers`, unchanged; here is only what transformers, peft and TRL
    want to call.

Weights have the names of this package with "model." in front, but for the head: ``lm_head.weight``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from dualroute.attention.compiled import lay_out_in_graph, tracing
from dualroute.attention.core.cache import LayerCache
from dualroute.attention.core.layout import Layout
from dualroute.attention.decoding import share_choices
from dualroute.attention.layer import DualRouting
from dualroute.export.hf.cache_dualroute import DualRoutingCache, NewTokens
from dualroute.export.hf.configuration_dualroute import DualRoutingConfig
from dualroute.model.config import ModelConfig
from dualroute.model.frontends import Frontend
from dualroute.model.layers import TransformerBlock, norm_of, shared_choices

CAPACITY = 512  # tokens that a cache has room for at first


class DualRoutingLayer(GradientCheckpointingLayer, TransformerBlock):
    """The block of the model, which transformers can recompute in the backward pass."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        for projection in (self.attention.out_proj, self.ffn.down):
            projection.into_residual = True  # type: ignore[assignment]


class DualRoutingPreTrainedModel(PreTrainedModel):
    """What transformers knows of the weights."""

    config_class = DualRoutingConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DualRoutingLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _input_embed_layer = "embedding"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            if getattr(module, "into_residual", False):  # see `DualRoutingTransformer.init_weights`
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            if isinstance(module, Frontend):
                nn.init.normal_(module.bias, std=std)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, DualRouting) and module.gate_weight is not None:
            nn.init.zeros_(module.gate_weight)


class DualRoutingModel(DualRoutingPreTrainedModel):
    """The backbone: ids, images or frames in, hidden states after the final norm out."""

    def __init__(self, config: DualRoutingConfig) -> None:
        super().__init__(config)
        shape = config.shape
        assert shape.vocab_size is not None
        self.embedding: nn.Embedding | Frontend
        if shape.frontend is None:
            self.embedding = nn.Embedding(shape.vocab_size, shape.dim)
        else:
            self.embedding = Frontend(shape.frontend, shape.dim)
            self.main_input_name = "input_features" if shape.frontend.kind == "frames" else "pixel_values"
        self._choice_groups = config.shape.choice_groups
        self.layers = nn.ModuleList(DualRoutingLayer(shape.of_layer(i)) for i in range(shape.num_layers))
        self.norm = norm_of(shape)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, n, dim); n patches of an image come in raster order.

        Args:
            input_ids: (B, n); with a filled cache the tokens that follow it.
            attention_mask: (B, n), or (B, past + n) with a cache; 0 = padding, anywhere.
            position_ids: (B or 1, n).  Without a cache a document begins wherever it is 0: several texts
                packed into a row do not see each other.
            past_key_values: What an earlier call returned.
            inputs_embeds: (B, n, dim), instead of ``input_ids``.
            use_cache: Return a cache; null does so as config.use_cache says, but not for packed rows nor
                in training, where a layer that is recomputed must not fill one twice.
            segment_ids: (B, n) document number of each token, instead of position_ids.
            output_hidden_states: Return those before each layer and after the norm, or the ones of these
                numbers.
            pixel_values: (B, channels, height, width), from -1 to 1, of a model that reads images.
            input_features: (B, n, features) of a model that reads sound.

        Raises:
            ValueError: Not one of what enters was given, or what the model does not read; attention weights
                are asked for, which never exist as a whole; a cache for packed rows; more tokens than the
                cache may hold.
        """
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise ValueError(
                "output_attentions: the weights of DualRouting attention are never held as a whole"
            )
        hidden = self._embedded(input_ids, inputs_embeds, pixel_values, input_features)
        if position_ids is not None:
            position_ids = position_ids.expand(hidden.shape[:2])
        cache = self._given_cache(past_key_values)
        mask = _new_columns(attention_mask, 0 if cache is None else cache.width, hidden)
        tokens = NewTokens(hidden, mask, position_ids)
        if cache is None and use_cache is not False:
            cache = self._own_cache(tokens, segment_ids, use_cache)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wanted = False if wanted is None else wanted
        states: list[Tensor] | None = None if wanted is False else []
        if cache is None or cache.deferred is tokens:
            last = self._whole(tokens, segment_ids, states)
        else:
            if segment_ids is not None:
                raise ValueError("segment_ids: packed rows have no cache; give one text per row")
            last = self._cached(tokens, cache, states)
        return BaseModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=None if use_cache is False else cache,
            hidden_states=None if states is None else _chosen(states, wanted),  # type: ignore[arg-type]
        )

    def _embedded(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        pixel_values: Tensor | None,
        input_features: Tensor | None,
    ) -> Tensor:
        """(B, n, dim) of the one thing that was given."""
        entering = {
            "input_ids": input_ids, "pixel_values": pixel_values, "input_features": input_features
        }  # fmt: skip
        given = [name for name, value in entering.items() if value is not None]
        if len(given) + (inputs_embeds is not None) != 1:
            raise ValueError(f"give either {self.main_input_name} or inputs_embeds, and not both")
        if inputs_embeds is not None:
            return inputs_embeds
        if given[0] != self.main_input_name:
            raise ValueError(f"this model reads {self.main_input_name}, and not {given[0]}")
        if pixel_values is not None:
            assert isinstance(self.embedding, Frontend)
            return self.embedding(_patches(pixel_values, self.embedding.in_features, self.config))
        embedded: Tensor = self.embedding(entering[given[0]])
        return embedded

    def new_cache(self, expected: int | None = None, cache_dtype: str = "auto") -> DualRoutingCache:
        """An empty cache for texts of ``expected`` tokens when they are finished (null: the model's context);
        more may come, up to the context.  ``cache_dtype`` int8 or int4 keeps complete blocks of the global
        route as integers; give such a cache to ``generate`` as ``past_key_values``."""
        layers, context = self.layers, self.config.max_position_embeddings
        choice_groups = self._choice_groups

        def new_caches(batch: int, length: int, device: torch.device) -> list[LayerCache]:
            caches = []
            for layer in layers:
                weight = layer.attention.out_proj.weight  # type: ignore[union-attr]
                place = device if weight.device.type == "meta" else weight.device  # meta: offloaded
                attention: Any = layer.attention
                options: Any = {"capacity": CAPACITY, "cache_dtype": cache_dtype}
                caches.append(attention.new_cache(batch, length, place, **options))
            for group in choice_groups:
                first: Any = layers[group[0]].attention
                share_choices([caches[number] for number in group], first.routing.top_k)
            return caches

        expected = expected or context
        return DualRoutingCache(new_caches, len(layers), expected, max(expected, context))

    def _given_cache(self, given: Cache | None) -> DualRoutingCache | None:
        if given is None or isinstance(given, DualRoutingCache):
            if given is not None and self.gradient_checkpointing and self.training:
                raise ValueError("past_key_values: with gradient checkpointing layers cannot read a cache")
            return given
        if given.get_seq_length():
            raise ValueError(f"past_key_values is a {type(given).__name__}: give what this model returned")
        return self.new_cache()

    def _own_cache(
        self, tokens: NewTokens, segment_ids: Tensor | None, use_cache: bool | None
    ) -> DualRoutingCache | None:
        """A cache for a call that was given none: filled by it if asked for, else deferred or null."""
        if not self.layers[0].attention.causal:  # type: ignore[union-attr]
            return None
        if use_cache is None and tracing():  # a graph makes no caches that nobody asked for
            return None
        if use_cache is None:
            training = self.training and torch.is_grad_enabled()
            if not self.config.use_cache or training or segment_ids is not None or _packed(tokens):
                return None
            cache = self.new_cache()
            cache.defer(tokens)
            return cache
        if segment_ids is not None or _packed(tokens):
            raise ValueError("use_cache: packed rows have no cache; give one text per row")
        if self.gradient_checkpointing and self.training:
            return None
        return self.new_cache()

    def _whole(self, tokens: NewTokens, segment_ids: Tensor | None, states: list[Tensor] | None) -> Tensor:
        """Whole texts, padded or packed, in one pass."""
        hidden, positions = tokens.embeddings, tokens.positions
        batch, length = hidden.shape[:2]
        if segment_ids is None and positions is not None:
            segment_ids = (positions == 0).cumsum(-1) + 1
        attention: DualRouting = self.layers[0].attention  # type: ignore[assignment]
        grid, block = attention.grid, attention.block
        lay_out = lay_out_in_graph if tracing() and grid is None else Layout.of_batch
        layout = lay_out(None, batch, length, block, segment_ids, tokens.mask, hidden.device, grid)
        if positions is not None:
            layout = layout.at_positions(positions)
        if isinstance(self.embedding, Frontend):
            hidden = self.embedding.at_places(hidden, layout.positions)
        for layer in self.layers:
            layer.attention.prepare(layout, hidden.dtype)  # type: ignore[union-attr,operator]
        return self._through(hidden, states, layout=layout)

    def _cached(self, tokens: NewTokens, cache: DualRoutingCache, states: list[Tensor] | None) -> Tensor:
        """Tokens that join the cache; 0 at padding."""
        if cache.deferred is not None:
            before, cache.deferred, cache.width = cache.deferred, None, 0
            self._cached(before, cache, None)
        hidden, positions = tokens.embeddings, tokens.positions
        whole: list[Tensor] = []
        for group, chosen in cache.parts(tokens):
            of_group: list[Tensor] | None = None if states is None else []
            if chosen is None:
                last = self._through(hidden, of_group, positions=positions, caches=group.caches)
                if states is not None:
                    states += of_group or []
                return last
            shape = (len(group.rows), -1)  # equally many tokens in each row
            last = self._through(
                hidden[chosen].unflatten(0, shape),
                of_group,
                positions=None if positions is None else positions[chosen].view(shape),
                caches=group.caches,
            )
            parts = [*(of_group or []), last]
            whole = whole or [part.new_zeros(*hidden.shape[:2], part.shape[-1]) for part in parts]
            places = chosen.nonzero(as_tuple=True)
            whole = [
                rows.index_put(places, part.flatten(0, 1)) for rows, part in zip(whole, parts, strict=True)
            ]
        if not whole:  # padding alone
            whole = [torch.zeros_like(hidden)] * (1 if states is None else len(self.layers) + 2)
        if states is not None:
            states += whole[:-1]
        return whole[-1]

    def _through(
        self,
        hidden: Tensor,
        states: list[Tensor] | None,
        caches: list[LayerCache] | None = None,
        **attention: Any,
    ) -> Tensor:
        choices = shared_choices(len(self.layers), self._choice_groups, attention.get("layout"))
        for number, (layer, choice) in enumerate(zip(self.layers, choices, strict=True)):
            if states is not None:
                states.append(hidden)
            own = {} if caches is None else {"cache": caches[number]}
            hidden = layer(hidden, choice=choice, **attention, **own)
        hidden = self.norm(hidden)
        if states is not None:
            states.append(hidden)
        return hidden


class DualRoutingForCausalLM(DualRoutingPreTrainedModel, GenerationMixin):
    """The backbone with a next-token head."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: DualRoutingConfig) -> None:
        super().__init__(config)
        self.model = DualRoutingModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss of ``labels``; the other arguments as for `DualRoutingModel`.

        Args:
            labels: (B, n), usually the input_ids themselves: they are shifted here; -100 counts nothing.
            logits_to_keep: How many positions, from the end, get logits (0: all), or which ones.
            kwargs: ``num_items_in_batch``: what the sum of the losses is divided by.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Called by `generate`: gives it a cache that knows how long the texts may become."""
        mask = model_kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.any(1).all()):
            raise ValueError("attention_mask: a row has no token at all; leave it away, or give it <bos>")
        given = model_kwargs.get("past_key_values")
        if isinstance(given, DualRoutingCache):
            given.grow(max_cache_length + 1)
        if generation_config.use_cache is False or given is not None:
            prepare: Any = super()._prepare_cache_for_generation  # type: ignore[misc]
            return prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation}: this model has a cache of "
                f"its own; leave the option away"
            )
        model_kwargs["past_key_values"] = self.model.new_cache(max_cache_length + 1)
        return None


def _patches(images: Tensor, features: int, config: Any) -> Tensor:
    """(B, channels, height, width) → (B, patches, features) in raster order, filled up with black as in
    training (`patches_of`).

    Raises:
        ValueError: Images of another shape than the model reads.
    """
    wanted = [config.num_channels, *config.image_size]
    if images.ndim != 4 or list(images.shape[1:]) != wanted:
        raise ValueError(f"pixel_values has shape {list(images.shape)}: give [batch, {str(wanted)[1:]}")
    side = math.isqrt(features // config.num_channels)
    down, across = (-size % side for size in config.image_size)
    images = F.pad(images, (0, across, 0, down), value=-1.0)
    cut = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, C, down, side, across, side)
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _new_columns(attention_mask: Tensor | None, past: int, hidden: Tensor) -> Tensor | None:
    """(B, n) of the new tokens, False = padding; null where there is none."""
    if attention_mask is None:
        return None
    batch, length = hidden.shape[:2]
    if attention_mask.ndim != 2 or len(attention_mask) != batch:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}: give ({batch}, length)")
    if attention_mask.shape[1] not in (length, past + length):
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns: give {length} or, with the {past} tokens "
            f"in the cache, {past + length}"
        )
    mask = attention_mask[:, -length:].to(hidden.device, torch.bool)
    if tracing():
        return mask
    return None if bool(mask.all()) else mask


def _packed(tokens: NewTokens) -> bool:
    """Whether a row holds more than one text: a token after the first one has position 0."""
    if tokens.positions is None:
        return False
    begins = tokens.positions == 0
    if tokens.mask is None:
        return bool(begins[:, 1:].any())
    before = tokens.mask.cumsum(1) - tokens.mask.long()  # tokens of the row before this one
    return bool((begins & tokens.mask & (before > 0)).any())


def _chosen(states: list[Tensor], wanted: bool | int | Iterable[int]) -> tuple[Tensor | None, ...]:
    """All hidden states, or null in the place of those that are not wanted."""
    if isinstance(wanted, bool):
        return tuple(states)
    numbers = {number % len(states) for number in ([wanted] if isinstance(wanted, int) else wanted)}
    return tuple(state if number in numbers else None for number, state in enumerate(states))
