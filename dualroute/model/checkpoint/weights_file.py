"""Writing and reading a safetensors file tensor by tensor.

Writing: names, dtypes and shapes of all tensors come first, then the tensors themselves, one after the other.
The format's header (8 bytes of length, then JSON with every offset) can be written before any tensor is
there, so only one of them has to be in memory, and several processes can write one file, each its bytes
(:func:`pieces_of`).  Next: anything that reads safetensors.

Reading: :class:`TensorFile` reads the header, and then what it is asked for: a tensor, or some of its rows,
into memory of its own.  Next: :mod:`~dualroute.model.checkpoint.format`, and trainers that keep a part of
each tensor.

The library's own ``save_file`` wants the whole model at once, which a rank that gathers a partitioned model
may not have room for; its ``load_file`` gives all tensors, and the pages of the file that it maps count as
memory of the process until the last of them is dropped.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualroute.errors import UserError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
#: Of a header, as the safetensors library has it.
MAX_HEADER_BYTES = 100_000_000
_REMEDY = "use another checkpoint"


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


class TensorFile:
    """A safetensors file of which single tensors are read.

    Args:
        path: The file.

    Attributes:
        layout: {name: (dtype, shape)} of every tensor, in the order of the file.

    Raises:
        UserError: It cannot be read, is no such file, or its header does not fit its size.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._starts: dict[str, int] = {}
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                    raise self._unreadable(f"its header has {length:,} bytes")
                header = json.loads(stream.read(length))
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise self._unreadable(str(error) or type(error).__name__) from error
        if not isinstance(header, dict):
            raise self._unreadable("its header is no table")
        for name, entry in header.items():
            if name != "__metadata__":
                self._take(name, entry, 8 + length, size)

    def _take(self, name: str, entry: Any, first: int, size: int) -> None:
        try:
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            start, end = entry["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
        except (KeyError, TypeError, ValueError) as error:
            raise self._unreadable(f"its header says {str(entry)[:80]} of {name[:80]}") from error
        if not whole or end - start != math.prod(shape) * dtype.itemsize or first + end > size:
            raise self._unreadable(f"{name[:80]} is not where its header says")
        self.layout[name] = (dtype, shape)
        self._starts[name] = first + start

    def _unreadable(self, reason: str) -> UserError:
        return UserError(f"{self.path} cannot be read ({reason}): {_REMEDY}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of every tensor."""
        return {name: shape for name, (_, shape) in self.layout.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or its rows [start, stop) along the first axis, on the CPU.

        Raises:
            KeyError: There is no such tensor.
            UserError: The file cannot be read.
        """
        dtype, shape = self.layout[name]
        start = self._starts[name]
        if rows is not None:
            low, high = rows
            start += low * math.prod(shape[1:]) * dtype.itemsize
            shape = (high - low, *shape[1:])
        tensor = torch.empty(shape, dtype=dtype)
        target = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            with self.path.open("rb", buffering=0) as stream:
                stream.seek(start)
                while target:
                    count = stream.readinto(target)
                    if not count:
                        raise self._unreadable(f"it ends inside {name}")
                    target = target[count:]
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from error
        return tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in the order of the file; each is dropped here before the next is read."""
        for name in self.layout:
            yield name, self.read(name)
