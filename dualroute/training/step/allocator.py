"""Keep what was freed, or give it back: settings of the C library for training on a CPU.

A training step frees and allocates the same large tensors again and again. By default glibc gives each one
above 32 MiB back to the kernel, which hands the same pages out again, cleared, one page fault at a time.

On a virtual machine those faults can cost more than the arithmetic on the pages. The
price of keeping them is that a process never shrinks below its peak, and that holes between what lives add
to the peak.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
_LARGEST = 2**31 - 1

_keeping = False


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to reuse large blocks; False where there is no such setting."""
    global _keeping
    library = _glibc()
    if library is None:
        return False
    _keeping = True
    return bool(library.mallopt(_MMAP_THRESHOLD, 1 << 30)) and bool(
        library.mallopt(_TRIM_THRESHOLD, _LARGEST)
    )


def give_back_freed_memory(above: int = 4 << 20) -> bool:
    """Return to the kernel what is free now, and from now on blocks of more bytes as soon as they are freed.

    For those who would rather have the memory than the time; False where there is no such setting.
    """
    global _keeping
    library = _glibc()
    if library is None:
        return False
    _keeping = False
    library.malloc_trim(0)
    return bool(library.mallopt(_MMAP_THRESHOLD, above))


@contextmanager
def giving_back_freed_memory() -> Iterator[None]:
    """Inside, blocks above 256 KiB go back as soon as they are freed; after it, what was asked for before."""
    was_keeping = _keeping
    if was_keeping:
        give_back_freed_memory(above=256 << 10)
    try:
        yield
    finally:
        if was_keeping:
            keep_freed_memory()


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it has these settings."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
        _ = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):
        return None
    return library
