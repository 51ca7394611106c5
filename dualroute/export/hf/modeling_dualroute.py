"""`DualRoutingTransformer` as a transformers model: `from_pretrained`, `generate`, a loss from labels.

In: token ids, with an attention mask where a batch is padded.  Out: logits.  The model itself is
:mod:`dualroute.model.transformer`, unchanged; here is only what transformers wants to call.

Rows of a padded batch have caches of their own.  The model's caches hold rows of equal
length and no padding, so the rows are sorted into groups of equal length, each group reads only its tokens,
and a padded row gives the same text as alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from dualroute.attention.core.cache import LayerCache
from dualroute.attention.layer import DualRouting
from dualroute.export.hf.configuration_dualroute import DualRoutingConfig
from dualroute.model.transformer import DualRoutingTransformer

CAPACITY = 512  # tokens that a cache has room for at first


@dataclass
class _Group:
    """Rows of the batch that hold equally many tokens, and their caches, one per layer."""

    rows: Tensor
    caches: list[LayerCache]


class DualRoutingCache(Cache):
    """The keys, values and block statistics of a batch: grows with the texts, follows a beam search.

    Args:
        new_caches: (batch, max_length) → empty caches, one per layer.
        max_length: Tokens at most; also decides, for ``global_mode="auto"``, whether the global route reads
            everything or is routed.
    """

    def __init__(self, new_caches: Callable[[int, int], list[LayerCache]], max_length: int) -> None:
        super().__init__(layers=[])
        self._new_caches, self.max_length = new_caches, max_length
        self.groups: list[_Group] = []
        self.width = 0  # columns of the batch seen, padding included

    def add_rows(self, rows: Tensor) -> None:
        """Begin the texts of these rows of the batch, all of one length."""
        self.groups.append(_Group(rows, self._new_caches(len(rows), self.max_length)))

    # ---------------------------------------------------------------- what transformers asks for

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_length

    def __len__(self) -> int:
        return len(self.groups[0].caches) if self.groups else 0

    @property
    def batch_size(self) -> int:
        return sum(len(group.rows) for group in self.groups) or -1

    @property
    def is_initialized(self) -> bool:
        return bool(self.groups)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    def reset(self) -> None:
        self.groups, self.width = [], 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r of the batch goes on with the text of row beam_idx[r]."""
        groups = []
        for group in self.groups:
            found = beam_idx[:, None] == group.rows.to(beam_idx.device)  # (rows, rows of the group)
            rows, texts = found.nonzero(as_tuple=True)
            if len(rows):
                for cache in group.caches:
                    cache.select(texts)
                groups.append(_Group(rows, group.caches))
        self.groups = groups

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        device = self.groups[0].rows.device
        self.reorder_cache(torch.arange(self.batch_size, device=device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "a DualRouting cache cannot be cut back, its local heads keep only their window: use greedy "
            "search, sampling or beam search, not assisted decoding"
        )


class DualRoutingPreTrainedModel(PreTrainedModel):
    """What transformers knows of the weights."""

    config_class = DualRoutingConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ["TransformerBlock"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, DualRouting) and module.gate_weight is not None:
            nn.init.zeros_(module.gate_weight)
        elif isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        elif isinstance(module, DualRoutingTransformer):
            module.init_weights()


class DualRoutingForCausalLM(DualRoutingPreTrainedModel, GenerationMixin):
    """A DualRouting model with its next-token head."""

    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: DualRoutingConfig) -> None:
        super().__init__(config)
        self.model = DualRoutingTransformer(config.shape)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        """The head as the layer that transformers knows how to resize; it holds the same parameter."""
        weight = self.model.head.weight
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = weight
        return linear

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head.weight = new_embeddings.weight

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        segment_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss of ``labels``.

        Args:
            input_ids: (B, n); with a filled cache the tokens that follow it.
            attention_mask: (B, n), or (B, past + n) with a cache; 0 = padding, on either side.
            position_ids: (B or 1, n).  Without a cache a document begins wherever it is 0: several texts
                packed into a row do not see each other.
            past_key_values: What an earlier call returned.
            labels: (B, n), usually the input_ids themselves: they are shifted here; -100 counts nothing.
            use_cache: Return a cache; null does so where one is given.
            logits_to_keep: How many positions, from the end, get logits (0: all), or which ones.
            segment_ids: (B, n) document number of each token, instead of position_ids.

        Raises:
            ValueError: Attention weights are asked for, which never exist as a whole; padding among the
                tokens that follow a cache; more tokens than the cache may hold.
        """
        if kwargs.pop("output_attentions", False):
            raise ValueError(
                "output_attentions: the weights of DualRouting attention are never held as a whole"
            )
        if position_ids is not None:
            position_ids = position_ids.expand(input_ids.shape)
        if use_cache is None:
            use_cache = past_key_values is not None
        if use_cache:
            cache = self._cache(past_key_values)
            mask = _new_columns(attention_mask, cache.width, input_ids)
            hidden = self._cached(input_ids, mask, position_ids, cache)
        else:
            if segment_ids is None and position_ids is not None:
                segment_ids = (position_ids == 0).cumsum(-1) + 1
            mask = _new_columns(attention_mask, 0, input_ids)
            if mask is None:  # else a segment 0 would be taken for padding
                mask = torch.ones_like(input_ids, dtype=torch.bool)
            hidden = self.model.hidden_states(
                input_ids, segment_ids=segment_ids, positions=position_ids, attention_mask=mask
            )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)

    def new_cache(self, max_length: int | None = None) -> DualRoutingCache:
        """An empty cache for texts of up to ``max_length`` tokens (null: the model's context)."""

        def new_caches(batch: int, length: int) -> list[LayerCache]:
            return [
                layer.attention.new_cache(batch, length, capacity=CAPACITY) for layer in self.model.layers
            ]

        return DualRoutingCache(new_caches, max_length or self.config.shape.max_context)

    def _cache(self, given: Cache | None) -> DualRoutingCache:
        if isinstance(given, DualRoutingCache):
            return given
        if given is not None and given.get_seq_length():
            raise ValueError(f"past_key_values is a {type(given).__name__}: give what this model returned")
        return self.new_cache()

    def _cached(
        self, input_ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache: DualRoutingCache
    ) -> Tensor:
        """Hidden states (B, n, dim) of tokens that join the cache; 0 at padding."""
        if cache.groups:
            if mask is not None:
                raise ValueError(
                    "attention_mask: padding may only stand in the first call that fills a cache"
                )
            if cache.batch_size != len(input_ids):
                raise ValueError(f"the cache has {cache.batch_size} rows and input_ids {len(input_ids)}")
        else:
            for rows in _rows_of_equal_length(input_ids, mask):
                cache.add_rows(rows)
        cache.width += input_ids.shape[1]
        if len(cache.groups) == 1 and mask is None:
            return self.model.hidden_states(input_ids, positions=positions, caches=cache.groups[0].caches)
        hidden = None
        for group in cache.groups:
            kept = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
            chosen = torch.zeros_like(kept)
            chosen[group.rows] = kept[group.rows]
            shape = (len(group.rows), -1)  # equally many tokens in each row
            part = self.model.hidden_states(
                input_ids[group.rows][kept[group.rows]].view(shape),
                positions=None if positions is None else positions[group.rows][kept[group.rows]].view(shape),
                caches=group.caches,
            )
            if hidden is None:
                hidden = part.new_zeros(*input_ids.shape, part.shape[-1])
            place = torch.zeros_like(hidden[group.rows])
            place[kept[group.rows]] = part.flatten(0, 1)
            hidden[group.rows] = place
        assert hidden is not None
        return hidden

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Called by `generate`: gives it a cache that knows how long the texts may become."""
        if generation_config.use_cache is False or model_kwargs.get("past_key_values") is not None:
            prepare: Any = super()._prepare_cache_for_generation  # type: ignore[misc]
            return prepare(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation}: this model has a cache of "
                f"its own; leave the option away"
            )
        model_kwargs["past_key_values"] = self.new_cache(generation_config.max_length)
        return None


def _new_columns(attention_mask: Tensor | None, past: int, input_ids: Tensor) -> Tensor | None:
    """(B, n) of the new tokens, False = padding; null where there is none."""
    if attention_mask is None:
        return None
    batch, length = input_ids.shape
    if attention_mask.ndim != 2 or len(attention_mask) != batch:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}: give ({batch}, length)")
    if attention_mask.shape[1] not in (length, past + length):
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns: give {length} or, with the {past} tokens "
            f"in the cache, {past + length}"
        )
    mask = attention_mask[:, -length:].bool()
    return None if bool(mask.all()) else mask


def _rows_of_equal_length(input_ids: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    """The rows of the batch, grouped by their number of tokens."""
    if mask is None:
        yield torch.arange(len(input_ids), device=input_ids.device)
        return
    lengths = mask.sum(1)
    if int(lengths.min()) == 0:
        raise ValueError("attention_mask: a row has no token at all; leave it away, or give it <bos>")
    for length in lengths.unique():
        yield (lengths == length).nonzero()[:, 0]
