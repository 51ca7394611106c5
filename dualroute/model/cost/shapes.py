"""Names and shapes of a model's parameters, from its configuration alone.

In: a :class:`~dualroute.model.config.ModelConfig`.  Next: ``dualroute estimate``, the memory of a training.
No torch is imported, and no tensor is made.
"""

from __future__ import annotations

import math

from dualroute.model.config import ModelConfig, PartsConfig

Shape = tuple[int, ...]


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """{name: shape} of each parameter of the model, a tied head's once, as the model itself names them.

    Raises:
        ValueError: The vocabulary is not known.
    """
    config = config.resolved()
    if config.vocab_size is None:
        raise ValueError("the vocabulary is not known")
    dim, shapes = config.dim, dict[str, Shape]()
    if config.frontend is None:
        shapes["embedding.weight"] = (config.vocab_size, dim)
    else:
        shapes["embedding.weight"] = (dim, config.frontend.features)
        shapes["embedding.bias"] = (dim,)
        grid = config.frontend.grid_of_patches()
        if grid is not None and config.frontend.learned_places:
            shapes["embedding.places.weight"] = (grid.patches, dim)
    for index in range(config.num_layers):
        for name, shape in _of_layer(config.of_layer(index)).items():
            shapes[f"layers.{index}.{name}"] = shape
    shapes["norm.weight"] = (dim,)
    if not config.head_is_tied:
        shapes["head.weight"] = (config.vocab_size, dim)
    if config.task_head is not None:
        outputs = config.task_head.outputs
        shapes |= {"task_head.project.weight": (outputs, dim), "task_head.project.bias": (outputs,)}
    return shapes


def _of_layer(layer: ModelConfig) -> dict[str, Shape]:
    """Of one layer, whose configuration is that of ``ModelConfig.of_layer``."""
    assert layer.head_dim is not None
    assert layer.ffn_dim is not None
    parts, shapes = layer.parts or PartsConfig(), dict[str, Shape]()
    if parts.first_norm:
        shapes["attention_norm.weight"] = (layer.dim,)
    both = sum(heads_of(layer))
    if layer.gate:
        shapes["attention.gate_weight"] = (both, layer.dim)
    for route, heads in zip(("global", "local"), heads_of(layer), strict=True):
        if heads:
            rows = (heads + 2 * heads // layer.heads_per_group) * layer.head_dim
            shapes[f"attention.{route}_qkv.weight"] = (rows, layer.dim)
            if layer.qkv_bias:
                shapes[f"attention.{route}_qkv.bias"] = (rows,)
    shapes["attention.out_proj.weight"] = (layer.dim, both * layer.head_dim)
    if layer.qk_norm:
        shapes |= {f"attention.{of}_norm.weight": (layer.head_dim,) for of in ("query", "key")}
    shapes["ffn_norm.weight"] = (layer.dim,)
    for name in ("gate", "up"):
        shapes[f"ffn.{name}.weight"] = (layer.ffn_dim, layer.dim)
    shapes["ffn.down.weight"] = (layer.dim, layer.ffn_dim)
    return shapes


def heads_of(layer: ModelConfig) -> tuple[int, int]:
    """Query heads of the global and of the local route of a layer."""
    assert layer.global_heads is not None
    assert layer.local_heads is not None
    return layer.global_heads, layer.local_heads


def numel(shape: Shape) -> int:
    """Numbers of a tensor."""
    return math.prod(shape)
