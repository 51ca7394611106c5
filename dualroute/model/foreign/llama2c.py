"""Checkpoints of llama2.c, version 0: a header of seven numbers, then float32 weights without names.

In: ``NAME.bin``.  Here: the numbers of the header say where each matrix starts; rotary pairs are put into our
order.  Out: a dense `DualRoutingTransformer`.  Layout: https://github.com/karpathy/llama2.c, ``export.py``
(legacy_export) and ``run.c`` (memory_map_weights).

Llama2.c turns neighbouring channels (2i, 2i+1) of a head together, we turn
(i, i + d/2).  The rows of the query and key matrices are therefore reordered; nothing else is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dualroute.errors import UserError
from dualroute.model.config import ModelConfig

_HEADER = struct.Struct("<7i")  # dim, hidden, layers, heads, kv heads, ±vocabulary, context
_MAGIC = 0x616B3432  # "ak42": versions 1 and 2 begin with it


def interleaved_to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder (heads * head_dim, dim) rows from pairs (2i, 2i+1) to pairs (i, i + head_dim/2)."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def read_llama2c(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and weights, under our names, of a version 0 checkpoint.

    Raises:
        UserError: It is not one, or its size is not what its header announces.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    config = _config(path, data)
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads or 0, config.dim // config.num_heads
    dim, ffn, layers = config.dim, config.ffn_dim or 0, config.num_layers
    shapes = {
        "embedding": (config.vocab_size or 0, dim),
        "attention_norm": (layers, dim),
        "q": (layers, heads * head_dim, dim),
        "k": (layers, kv_heads * head_dim, dim),
        "v": (layers, kv_heads * head_dim, dim),
        "out_proj": (layers, dim, heads * head_dim),
        "ffn_norm": (layers, dim),
        "gate": (layers, ffn, dim),
        "down": (layers, dim, ffn),
        "up": (layers, ffn, dim),
        "norm": (dim,),
        "angles": (2, config.max_context, head_dim // 2),  # cosines and sines, not needed
    }
    if not config.tie_embeddings:
        shapes["head"] = shapes["embedding"]
    expected = _HEADER.size + 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    if len(data) != expected:
        raise UserError(
            f"{path} has {len(data):,} bytes, its header (dim {dim}, {layers} layers, …) announces "
            f"{expected:,}: not a llama2.c checkpoint of version 0, or truncated"
        )
    parts: dict[str, Tensor] = {}
    offset = _HEADER.size
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        array = np.frombuffer(data, dtype="<f4", count=count, offset=offset)
        parts[name] = torch.from_numpy(array.astype(np.float32)).view(shape)
        offset += 4 * count
    return config, dict(_named(parts, config, head_dim))


def _config(path: Path, data: bytes) -> ModelConfig:
    if len(data) < _HEADER.size:
        raise UserError(f"{path} has {len(data)} bytes: not a llama2.c checkpoint")
    dim, ffn, layers, heads, kv_heads, vocab, context = _HEADER.unpack_from(data)
    if dim == _MAGIC:
        raise UserError(f"{path} is a llama2.c checkpoint of version {ffn}: export it again as version 0")
    if not (0 < dim <= 1 << 16 and ffn > 0 and 0 < layers <= 1 << 10 and heads > 0 and context > 0):
        raise UserError(f"{path} does not begin as a llama2.c checkpoint of version 0 does")
    return ModelConfig(
        vocab_size=abs(vocab),
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_dim=ffn,
        max_context=context,
        attention="dense",
        tie_embeddings=vocab > 0,  # a negative vocabulary says that the head is its own
    )


def _named(parts: dict[str, Tensor], config: ModelConfig, head_dim: int) -> Iterator[tuple[str, Tensor]]:
    yield "embedding.weight", parts["embedding"]
    yield "norm.weight", parts["norm"]
    if "head" in parts:
        yield "head.weight", parts["head"]
    for layer in range(config.num_layers):
        name = f"layers.{layer}"
        query, key = (interleaved_to_halves(parts[part][layer], head_dim) for part in ("q", "k"))
        yield f"{name}.attention.global_qkv.weight", torch.cat([query, key, parts["v"][layer]])
        yield f"{name}.attention.out_proj.weight", parts["out_proj"][layer]
        for norm in ("attention_norm", "ffn_norm"):
            yield f"{name}.{norm}.weight", parts[norm][layer]
        for part in ("gate", "up", "down"):
            yield f"{name}.ffn.{part}.weight", parts[part][layer]
