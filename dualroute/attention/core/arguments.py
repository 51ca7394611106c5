"""What the routes refuse: tensors that do not fit together, before a kernel reads beyond one of them.

In: the arguments of a public function of this package. Out: nothing, or a `ValueError` (of the wrong kind: a
`TypeError`) that names the argument, what it is and what it should be.

Only sizes and types are looked at, which the host knows anyway. The numbers of a `selected` that a caller
gives are looked at too; those that the router has just chosen are not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualroute.attention.core.layout import Stream

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_rows(stream: Stream, query: Tensor, key: Tensor, *values: Tensor) -> None:
    """Queries (H, S, d), keys and values (H_kv, S, d) of one type, on the stream's device; H_kv divides H.

    Raises:
        TypeError: no tensor of floats, or types that differ.
        ValueError: shapes or devices do not fit.
    """
    if not isinstance(stream, Stream):
        raise TypeError(f"stream is a {type(stream).__name__}: give the `stream` of a Layout")
    slots = stream.num_slots
    for name, rows in (("query", query), ("key", key), *(("value", value) for value in values)):
        if not isinstance(rows, Tensor):
            raise TypeError(f"{name} is a {type(rows).__name__}: give a tensor")
        if rows.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {rows.dtype}: give 16, 32 or 64-bit floats")
        if rows.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {rows.dtype}, query {query.dtype}: give all of one type")
        if rows.layout != torch.strided:
            raise TypeError(f"{name} has layout {rows.layout}: give a dense tensor")
        if rows.ndim != 3 or rows.shape[1] != slots or 0 in rows.shape:
            raise ValueError(
                f"{name} has shape {tuple(rows.shape)}: give (heads, {slots}, d) for this stream"
            )
        if rows.device != stream.device and not _same_kind(rows.device, stream.device):
            raise ValueError(f"{name} is on {rows.device}, the stream on {stream.device}: move one of them")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"key has head size {key.shape[2]}, query {query.shape[2]}: they must be equal")
    if query.shape[0] % key.shape[0]:
        raise ValueError(f"key has {key.shape[0]} heads, which do not divide the {query.shape[0]} of query")
    for value in values:
        if value.shape != key.shape:
            raise ValueError(
                f"value has shape {tuple(value.shape)}, key {tuple(key.shape)}: they must be equal"
            )


def _same_kind(one: torch.device, other: torch.device) -> bool:
    """`cuda` is the current one of several."""
    return one.type == other.type and None in (one.index, other.index)


def check_whole(least: int, **values: int) -> None:
    """Whole numbers of at least `least`.

    Raises:
        TypeError: not a whole number.
        ValueError: too small.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name}={value!r} is no whole number")
        if value < least:
            raise ValueError(f"{name}={value} is too small: it must be at least {least}")


def check_parts(router: str, block: int, sub_block: int) -> None:
    """Bounds of the minmax router are taken of whole parts of a block."""
    if router == "minmax" and block % sub_block:
        raise ValueError(f"sub_block={sub_block} does not divide the {block} tokens of a block")


def check_selected(selected: Tensor, key: Tensor, stream: Stream, causal: bool) -> None:
    """(H_kv, S, 1 + top_k) as `select_blocks` gives it: the sink or -1, then different blocks, or -1.

    Raises:
        TypeError: no tensor of whole numbers.
        ValueError: the shape or device does not fit, or a token reads a block that it may not.
    """
    if not isinstance(selected, Tensor) or selected.dtype not in (torch.int32, torch.int64):
        kind = selected.dtype if isinstance(selected, Tensor) else type(selected).__name__
        raise TypeError(
            f"selected is of {kind}: give int32 or int64 numbers of blocks, as select_blocks does"
        )
    kv_heads, slots, _ = key.shape
    if selected.ndim != 3 or tuple(selected.shape[:2]) != (kv_heads, slots) or selected.shape[2] == 0:
        raise ValueError(
            f"selected has shape {tuple(selected.shape)}: give ({kv_heads}, {slots}, 1 + top_k) for this key"
        )
    if selected.device != key.device:
        raise ValueError(f"selected is on {selected.device}, key on {key.device}: move one of them")
    first = stream.first_blocks().repeat_interleave(stream.block)[:, None]  # (S, 1) of its document
    own = (torch.arange(slots, device=key.device) // stream.block)[:, None]
    size = stream.blocks_in_document().repeat_interleave(stream.block)[:, None]
    sink, chosen = selected[..., :1], selected[..., 1:]
    may = (chosen > first) & ((chosen < own) if causal else (chosen < first + size) & (chosen != own))
    ordered = chosen.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != -1)
    if not bool(((chosen == -1) | may).all() & ((sink == -1) | (sink == first)).all() & ~twice.any()):
        raise ValueError(
            "selected has blocks that a token may not read (first the sink of its document or -1, then other "
            "blocks of it, past ones if causal, none twice): give what select_blocks gives"
        )
