"""The C++ functions as operations on tensors: shapes, padding, types.

In and out: contiguous tensors on the CPU; heads of any size d, which are padded with zeros to a multiple of
LANES. Queries, keys, values, outputs and their gradients are stored as float32, float64 or bfloat16; what is
summed up over many of them (log-sum-exps, summaries, gradients of keys and values) is in `compute_dtype`.
H query heads, H_kv key heads, S slots, nb blocks, C = 1 + top_k. `blocks` are what `block_tables` gives.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.attention.backends.cpp.build import load
from dualroute.attention.core.far_summary import Summary
from dualroute.attention.core.layout import Stream

LANES = 16  # numbers of the widest vector
ROUTERS = {"minmax": 0, "moment": 1, "mean": 2}
UNITS = ("floats", "portable", "AMX")  # by the numbers of `Unit` in matrix_unit.h


def pad_heads(rows: Tensor) -> Tensor:
    """(..., d) contiguous, float16 widened, d padded with zeros to a multiple of LANES."""
    if rows.dtype == torch.float16:
        rows = rows.float()
    missing = -rows.shape[-1] % LANES
    return F.pad(rows, (0, missing)) if missing else rows.contiguous()


def unit_in_use() -> str:
    """Which of UNITS multiplies bfloat16."""
    return UNITS[load().unit_number()]


def use_unit(name: str | None = None) -> None:
    """Let one of UNITS multiply bfloat16 from now on, in the whole process; None: the best of this processor.

    Not while another thread computes.

    AMX multiplies tiles of bfloat16. "floats" widens them to float32 instead; "portable", for tests, rounds
    where AMX does, slowly.

    Raises:
        ValueError: it is none of UNITS, or this processor does not have it.
    """
    if name is not None and name not in UNITS:
        raise ValueError(f"unit is {name}: give one of {', '.join(UNITS)}")
    if not load().use_unit(-1 if name is None else UNITS.index(name)):
        raise ValueError(f"unit is {name}, which this processor or its system does not give")


def compute_dtype(rows: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def block_tables(stream: Stream, causal: bool) -> Tensor:
    """(1, nb) int32: the first block of the document of each block. Not causal (3, nb): also the last + 1
    block of the document, and how many tokens the block has. With copies: also `hidden_blocks`."""
    return stream.cached(("block tables", causal), lambda: _block_tables(stream, causal))


def _block_tables(stream: Stream, causal: bool) -> Tensor:
    first = stream.first_blocks()
    if stream.copies:
        return torch.cat([first[None], stream.hidden_blocks()])
    if causal:
        return first[None]
    ends = first + stream.blocks_in_document().to(torch.int32)
    return torch.stack([first, ends, stream.tokens_in_block().to(torch.int32)])


def select(
    query: Tensor, features: Tensor, blocks: Tensor, *, top_k: int, router: str, scale: float
) -> Tensor:
    """(H_kv, S, C) int32 for queries (H, S, d) and features (H_kv, tiles, f, parts, columns)."""
    kv_heads, _, _, parts, columns = features.shape
    selected = torch.full((kv_heads, query.shape[1], 1 + top_k), -1, dtype=torch.int32)
    _call(
        "select", query, kv_heads, blocks,
        ROUTERS[router], scale, query, features, parts, columns, top_k, selected,
    )  # fmt: skip
    return selected


def similar_order(keys: Tensor, cells: int) -> Tensor:
    """Order (..., n) int64 of keys (..., n, d), as `clusters.similar_order` gives it."""
    rows = (keys.float() if keys.dtype == torch.float16 else keys).contiguous()
    *_, size, dim = rows.shape
    order = torch.empty(rows.shape[:-1], dtype=torch.int32)
    function = getattr(load(), f"similar_order_{str(rows.dtype).removeprefix('torch.')}")
    sizes = (order.numel() // size, size, dim, size // cells, torch.get_num_threads())
    function.restype = None
    function(_argument(rows), *map(_Long, sizes), _argument(order))
    return order.long()


def summarise(key: Tensor, value: Tensor, blocks: Tensor, order: str) -> Summary | None:
    """The summary of keys and values (H_kv, S, d) of one shape, as `far_summary.summarise` gives it."""
    if order == "none":
        return None
    second = order == "second_order"
    shape = len(key), blocks.shape[1], key.shape[-1]
    far = Summary(_empty(key, (*shape[:2], (1 + second) * shape[2])), _empty(value, shape))
    _call("summarise", key, len(key), blocks, key, value, second, *far)
    return far


def routed_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far: Summary | None,
    selected: Tensor,
    blocks: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (H, S, d) and log-sum-exp (H, S).

    Raises:
        ValueError: `selected` names a block that is no other one of the token's document, causal no past one.
    """
    out, lse = torch.empty_like(query), _empty(query, query.shape[:2])
    done = _call(
        "routed_forward", query, len(key), blocks,
        scale, query, key, value, *_far(far), selected, selected.shape[-1], out, lse,
    )  # fmt: skip
    if not done:
        raise ValueError(
            f"selected has a block that is no {'other' if len(blocks) == 3 else 'past'} one of its document: "
            f"give what select_blocks gives"
        )
    return out, lse


def routed_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, far: Summary | None, selected: Tensor,
    out: Tensor, lse: Tensor, blocks: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Summary | None]:  # fmt: skip
    """Gradients of query, key, value and the summary."""
    to_rows = torch.empty_like(query), _empty(key, key.shape), _empty(value, value.shape)
    to_far = None if far is None else Summary(*map(torch.empty_like, far))
    _call(
        "routed_backward", query, len(key), blocks,
        scale, query, key, value, *_far(far), selected, selected.shape[-1], grad, out, lse,
        *to_rows, *(to_far or (None, None)),
    )  # fmt: skip
    return *to_rows, to_far


def local_forward(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (H, S, d) and log-sum-exp (H, S)."""
    out, lse = torch.empty_like(query), _empty(query, query.shape[:2])
    _call("local_forward", query, len(key), blocks, _Long(window), scale, query, key, value, out, lse)
    return out, lse


def local_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    blocks: Tensor, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value."""
    grads = torch.empty_like(query), _empty(key, key.shape), _empty(value, value.shape)
    _call(
        "local_backward", query, len(key), blocks,
        _Long(window), scale, grad, query, key, value, out, lse, *grads,
    )  # fmt: skip
    return grads


def _empty(rows: Tensor, shape: Sequence[int]) -> Tensor:
    return rows.new_empty(shape, dtype=compute_dtype(rows))


_Long = ctypes.c_long


def _far(far: Summary | None) -> tuple[Any, ...]:
    return (None, None, _Long(0)) if far is None else (*far, _Long(far.keys.shape[-1]))


def _call(name: str, query: Tensor, kv_heads: int, blocks: Tensor, *arguments: Any) -> Any:
    heads, slots, dim = query.shape
    sizes = (heads, kv_heads, slots, slots // blocks.shape[1], dim, torch.get_num_threads(), len(blocks))
    function = getattr(load(), f"{name}_{str(query.dtype).removeprefix('torch.')}")
    function.restype = ctypes.c_bool if name == "routed_forward" else None
    return function((_Long * len(sizes))(*sizes), _argument(blocks), *map(_argument, arguments))


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_double(value) if isinstance(value, float) else value
