"""Who is stepped how: the trainable parameters of a model, divided into groups of an optimizer.

In: a model, whole or partitioned by ZeRO-3.  Here: which of its parameters decay, which have a rate of their
own, and, for Muon, which are matrices of a layer and what stands in them side by side.  Next: ``build.py``.

Under ZeRO-3 a parameter's own shape is empty, its real one stands in ``ds_shape``.
Whoever decides by ``param.ndim`` what is decayed would then decay nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dualroute.attention.projections import Projections
from dualroute.model.layers import TransformerBlock
from dualroute.model.lm_head import NextTokenHead
from dualroute.training.finetuning.adapted import is_adapter
from dualroute.training.optim_config import OptimConfig
from dualroute.training.step.optim.muon import Matrix

# kinds of groups, in their order
_DECAYING, _KEPT, _EMBEDDING, _HEAD, _MATRICES = range(5)


def real_shape(parameter: Any) -> tuple[int, ...]:
    """Also under ZeRO-3."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def groups_of(
    model: nn.Module, config: OptimConfig, unit_of: Callable[[str], int] | None = None
) -> list[dict[str, Any]]:
    """:func:`parameter_groups` as ``config`` asks for them.

    With Muon embedding and head are apart whether they have rates of their own or not, so that a run that is
    resumed may be given some.
    """
    muon = config.name == "muon"
    groups = parameter_groups(
        model,
        config.weight_decay,
        decay_embeddings=config.decay_embeddings,
        unit_of=unit_of,
        matrices_apart=muon or config.base_dim is not None,
        embedding_apart=muon or config.embedding_lr is not None,
        head_apart=muon or config.head_lr is not None,
    )
    for group in groups if muon else ():
        if group["kind"] == "matrices":
            group["kind"] = "muon"
    return groups


def width_of(model: nn.Module) -> int:
    """``model.dim`` of the model whose layers are in ``model``."""
    blocks = (module for module in model.modules() if isinstance(module, TransformerBlock))
    return real_shape(_linear(next(blocks).attention.out_proj).weight)[0]


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    decay_embeddings: bool = False,
    unit_of: Callable[[str], int] | None = None,
    matrices_apart: bool = False,
    embedding_apart: bool = False,
    head_apart: bool = False,
) -> list[dict[str, Any]]:
    """The trainable parameters of ``model``, those with and those without weight decay.

    Matrices decay; norms and biases (anything with fewer than two axes) do not, nor do the attention's gates
    (parameters named ``gate…``), nor embeddings unless asked.  A tied output weight is the embedding, and
    counted once.

    Args:
        model: Whose parameters.
        weight_decay: Of those that decay.
        decay_embeddings: The embedding does.
        unit_of: By name, which parameters are stepped alike (``training/finetuning/depth.py``); null: all.
        matrices_apart: Matrices of layers (:func:`matrices_of`) are in groups of their own.
        embedding_apart: The embedding is, too.
        head_apart: The output weight is, where it is not the embedding's.

    Returns:
        Groups of each unit (an empty one is left out), in the order of ``model.parameters()``; each has its
        ``unit`` where there are several, and its ``kind``: matrices, embedding, head or rest, where that
        matters.

    Raises:
        ValueError: Nothing in ``model`` is trainable.
    """
    embeddings = {
        id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }
    heads = {id(module.weight) for module in model.modules() if isinstance(module, NextTokenHead)}
    matrices = {id(parameter) for parameter, _ in matrices_of(model)} if matrices_apart else set()
    found: dict[tuple[int, int], list[nn.Parameter]] = {}
    decay: dict[tuple[int, int], float] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_embedding = id(parameter) in embeddings
        is_gate = name.rpartition(".")[2].startswith("gate")  # not the weight of a layer called gate
        decays = len(real_shape(parameter)) >= 2 and not is_gate and (decay_embeddings or not is_embedding)
        kind = _DECAYING if decays else _KEPT
        if id(parameter) in matrices:
            kind = _MATRICES
        elif embedding_apart and is_embedding:
            kind = _EMBEDDING
        elif head_apart and id(parameter) in heads and not is_embedding:
            kind = _HEAD
        key = (0 if unit_of is None else unit_of(name), kind)
        found.setdefault(key, []).append(parameter)
        decay[key] = weight_decay if decays else 0.0
    if not found:
        raise ValueError("the model has no trainable parameter: unfreeze some before building the optimizer")
    names = {_MATRICES: "matrices", _EMBEDDING: "embedding", _HEAD: "head"}
    apart = matrices_apart or embedding_apart or head_apart
    return [
        {"params": found[key], "weight_decay": decay[key]}
        | ({} if unit_of is None else {"unit": key[0]})
        | ({"kind": names.get(key[1], "rest")} if apart else {})
        for key in sorted(found)
    ]


def matrices_of(model: nn.Module) -> list[tuple[Tensor, Matrix]]:
    """The weights of linear layers inside of Transformer blocks, which Muon steps, trainable ones.

    Queries, keys and values lie in one weight, a weight for each route; the output projection holds both
    routes side by side.  Each of these parts is orthogonalised for itself.  Adapters' thin factors are none
    of the matrices.
    """
    found: dict[int, tuple[Tensor, Matrix]] = {}
    for name, block in model.named_modules():
        if not isinstance(block, TransformerBlock):
            continue
        parts = _parts(block.attention)
        for inside, module in block.named_modules():
            if not isinstance(module, nn.Linear) or is_adapter(f"{name}.{inside}."):
                continue
            weight = module.weight
            if weight.requires_grad:
                rows, columns = real_shape(weight)
                of_rows, of_columns = parts.get(id(weight), ([rows], [columns]))
                found[id(weight)] = weight, Matrix.of(of_rows or [rows], of_columns or [columns])
    return list(found.values())


def _parts(attention: Projections) -> dict[int, tuple[list[int], list[int]]]:
    """Rows, and columns, of the parts of a weight; an empty list: it is not parted so."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    width = attention.head_dim
    for projection, heads in (
        (attention.global_qkv, attention.global_heads),
        (attention.local_qkv, attention.local_heads),
    ):
        if projection is not None:
            keys = heads // attention.group * width
            found[id(_linear(projection).weight)] = [heads * width, keys, keys], []
    routes = [heads * width for heads in (attention.global_heads, attention.local_heads) if heads]
    found[id(_linear(attention.out_proj).weight)] = [], routes
    return found


def _linear(module: nn.Module) -> Any:
    """The layer itself, where an adapter stands around it."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module  # type: ignore[operator]
