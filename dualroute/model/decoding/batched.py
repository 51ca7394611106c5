"""A step for several texts of different lengths at once, each with caches of its own (continuous batching,
Yu et al. 2022, Orca, §4): the weights are read once for all of them, the attention is each text's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dualroute.attention.core.cache import LayerCache
from dualroute.attention.decoding import decode_rows, row_tables
from dualroute.model.layers import TransformerBlock
from dualroute.model.transformer import DualRoutingTransformer

Caches = list[LayerCache]


@torch.no_grad()
def next_logits(model: DualRoutingTransformer, tokens: Sequence[int], texts: Sequence[Caches]) -> Tensor:
    """Logits (B, V) after one more token of each of B texts; `texts` are their caches, one for each layer."""
    hidden: Tensor = model.embedding(torch.tensor(tokens, device=model.norm.weight.device))
    first = model.layers[0]
    assert isinstance(first, TransformerBlock)
    tables = row_tables(first.attention, [text[0] for text in texts], hidden.dtype)
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, TransformerBlock)
        caches = [text[number] for text in texts]
        hidden = hidden + decode_rows(layer.attention, layer.attention_norm(hidden), caches, tables)
        hidden = hidden + layer.ffn(layer.ffn_norm(hidden))
    return model.head(model.norm(hidden))


def new_text(model: DualRoutingTransformer, capacity: int, *, cache_dtype: str = "auto") -> Caches:
    """Empty caches of one text, with room for `capacity` tokens.

    Whether a routed layer reads everything is decided by the model's context, not by the capacity: a text
    does not depend on how much was asked for.
    """
    weight, limit = model.norm.weight, model.config.max_context
    return [
        attention.new_cache(
            1, limit, weight.device, weight.dtype, min(capacity, limit), cache_dtype=cache_dtype
        )
        for attention in _attentions(model)
    ]


def copied(model: DualRoutingTransformer, text: Caches, capacity: int) -> Caches:
    """Caches that go on for themselves after what `text` holds, with room for `capacity` tokens in all."""
    kept = [cache.global_cache.cache_dtype for cache in text if cache.global_cache is not None]
    copies = new_text(model, capacity, cache_dtype=kept[0] if kept else "auto")
    for old, new in zip(text, copies, strict=True):
        for name in ("global_cache", "local_cache"):
            source, target = getattr(old, name), getattr(new, name)
            if source is None:
                continue
            target.length = source.length
            if name == "global_cache":
                target.regrouped = source.regrouped
            for part in (*source.OF_TOKENS, *source.OF_BLOCKS, *source.OF_TEXTS):
                held, room = getattr(source, part), getattr(target, part)
                if held is not None:
                    count = min(held.shape[1], room.shape[1])
                    room[:, :count] = held[:, :count]
    return copies


def num_bytes(model: DualRoutingTransformer, capacity: int, *, cache_dtype: str = "auto") -> int:
    """Memory of the caches of one text with room for `capacity` tokens."""
    weight, limit = model.norm.weight, model.config.max_context
    caches = [
        attention.new_cache(1, limit, "meta", weight.dtype, min(capacity, limit), cache_dtype=cache_dtype)
        for attention in _attentions(model)
    ]
    return held_bytes(caches)


def _attentions(model: DualRoutingTransformer) -> list[Any]:
    return [layer.attention for layer in model.layers]


def held_bytes(text: Caches) -> int:
    """Memory of the caches of a text."""
    return sum(tensor.nbytes for cache in text for tensor in _tensors(cache))


def _tensors(cache: LayerCache) -> list[Tensor]:
    parts = [part for part in (cache.global_cache, cache.local_cache) if part is not None]
    held: list[Any] = [
        getattr(part, name) for part in parts for name in (*part.OF_TOKENS, *part.OF_BLOCKS, *part.OF_TEXTS)
    ]
    return [tensor for tensor in held if tensor is not None]
