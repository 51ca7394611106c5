"""Where the keys and values of past blocks lie when not in the memory of the model's device.

In: the shapes of a global cache's tensors with a row for each token, all of their room at once. Out: tensors
in a memory-mapped file, or in the memory of the host; a step reads the few blocks there that it has chosen.
Statistics of blocks, which every step reads whole, stay where they were.

A file has no name from the moment it is made: whatever ends the process, the system frees it. Its bytes are
reserved first, since a full disk ends a process that writes to a mapping without a word. Pages that were
written or read are given back after each step: with every one that is read the system maps its neighbours,
megabytes a step. It keeps them as long as it has memory for them, and then reads them from the disk.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

HOST = "host"
_CHUNK = bytes(1 << 20)


class Pages(Protocol):
    """Memory for the tensors of one cache."""

    def zeros(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor of zeros."""

    def release(self) -> None:
        """Nothing of it will be read or written soon, but for a few blocks."""


class FilePages:
    """Tensors in files of a folder, which no other process sees.

    Raises:
        OSError: the folder is missing or full; the message names it and the bytes that are wanted.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._maps: list[mmap.mmap] = []

    def zeros(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        size = max(math.prod(shape) * dtype.itemsize, 1)
        try:
            with tempfile.TemporaryFile(prefix="dualroute-cache-", dir=self.folder) as file:
                _reserve(file.fileno(), size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            free = shutil.disk_usage(self.folder).free
            raise OSError(
                error.errno,
                f"there is no room for {size:,} bytes of keys or values, {free:,} are free: give a folder on "
                f"another disk, fewer tokens, or a smaller cache_dtype",
                str(self.folder),
            ) from error
        if sys.platform == "linux":
            mapped.madvise(mmap.MADV_RANDOM)
        self._maps.append(mapped)
        return torch.frombuffer(mapped, dtype=dtype, count=math.prod(shape)).view(shape)

    def release(self) -> None:
        if sys.platform == "linux":
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)


class HostPages:
    """Tensors in the host's memory, for a model on another device."""

    def zeros(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=torch.cuda.is_available())

    def release(self) -> None:
        pass


def make_pages(offload: str | Path, device: torch.device) -> Pages:
    """`HostPages` for "host", else files in the folder `offload`.

    Raises:
        ValueError: "host" for a model that lies there, a folder for one that does not.
        NotADirectoryError: there is no such folder.
    """
    if str(offload) == HOST:
        if device.type == "cpu":
            raise ValueError("cache_offload=host: the model is on the CPU already; give a folder")
        return HostPages()
    if device.type != "cpu":
        raise ValueError(f"cache_offload={offload}: files are for models on a CPU; use host on {device.type}")
    if not Path(offload).is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "there is no such folder: make it first", str(offload))
    return FilePages(offload)


def _reserve(file: int, size: int) -> None:
    """Give a new file `size` bytes of the disk."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    left = size
    while left > 0:
        left -= os.write(file, _CHUNK[:left])
