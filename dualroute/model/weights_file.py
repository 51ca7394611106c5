"""Writing a safetensors file tensor by tensor.

In: names, dtypes and shapes of all tensors, then the tensors themselves, one after the other.  Here: the
format's header (8 bytes of length, then JSON with every offset) can be written before any tensor is there,
so only one of them has to be in memory, and several processes can write one file, each its bytes
(:func:`pieces_of`).  Next: anything that reads safetensors.

The library's own ``save_file`` wants the whole model at once, which a rank that gathers
a partitioned model may not have room for.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """:func:`write_weights` for tensors that are all there."""
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    write_weights(path, layout, tensors.items())


def write_weights(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write ``tensors`` to ``path``.

    Args:
        path: File to write; not flushed to the disk.
        layout: {name: (dtype, shape)} in the order in which the tensors come.
        tensors: (name, tensor) in that order; each is dropped before the next is asked for.

    Raises:
        ValueError: A tensor is not the one that ``layout`` announces.
    """
    with path.open("wb") as stream:
        for piece in pieces_of(layout, tensors):
            stream.write(piece.cpu().numpy().data)


def size_of(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Bytes of the file."""
    weights = sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())
    return len(_header(layout)) + weights


def pieces_of(
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Tensor]:
    """The bytes [start, stop) of the file, in order, each piece (n,) uint8, on the device of its tensor.

    All tensors are asked for, whatever is wanted of them: to gather one may take every rank.

    Raises:
        ValueError: A tensor is not the one that ``layout`` announces.
    """
    header = _header(layout)
    end = sys.maxsize if stop is None else stop
    if header[start:end]:
        yield torch.frombuffer(bytearray(header[start:end]), dtype=torch.uint8)
    expected, position = iter(layout.items()), len(header)
    for name, tensor in tensors:
        wanted = next(expected, None)
        if wanted != (name, (tensor.dtype, tuple(tensor.shape))):
            raise ValueError(f"{name} {tensor.dtype} {tuple(tensor.shape)} came where {wanted} was expected")
        first, last = max(start, position), min(end, position + tensor.nbytes)
        if first < last:
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            yield flat[first - position : last - position]
        position += tensor.nbytes
    missing = next(expected, None)
    if missing is not None:
        raise ValueError(f"{missing[0]} was announced and never came")


def _header(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
