"""Keep what was freed: a setting of the C library for training on a CPU.

A training step frees and allocates the same large tensors again and again. By default glibc gives each one
above 32 MiB back to the kernel, which hands the same pages out again, cleared, one page fault at a time.

The surprising fact: on a virtual machine those faults can cost more than the arithmetic on the pages. The
price of keeping them is that a process never shrinks below its peak.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to reuse large blocks; False where there is no such setting."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_TRIM_THRESHOLD, _LARGEST))
