"""Which kernels run: plain torch everywhere, or the C++ and Triton ones where they can.

In: the queries of a route, and DUALROUTE_KERNELS from the environment. Out: the package `cpu_kernels` or
`triton_kernels`, or None for the plain path.

    auto      cpp on a CPU where it can be compiled, else torch (the default)
    torch     plain torch
    cpp       the C++ kernels on a CPU; an error where they cannot be compiled
    triton    the Triton kernels on a GPU

Plain torch is the default on a GPU. The Triton kernels are tested in the interpreter and
compiled for GPUs, but have not been timed on one; whoever has one turns them on and compares.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

VARIABLE = "DUALROUTE_KERNELS"
CHOICES = ("auto", "torch", "cpp", "triton")
_default = "auto"
_only_torch = ContextVar("only_torch", default=False)


def set_backend(name: str) -> None:
    """Choose the kernels of this process: auto, torch, cpp or triton. DUALROUTE_KERNELS overrides it.

    Raises:
        ValueError: an unknown name. Whether what it names can be had is seen by `describe`, or in use.
    """
    global _default
    if name not in CHOICES:
        raise ValueError(f"the attention back end {name} is unknown: use {', '.join(CHOICES)}")
    _default = name


def describe(device: torch.device | str) -> str:
    """The line to log: what the attention runs on, on `device`.

    Raises:
        ValueError: as `fast_kernels`.
    """
    kernels = fast_kernels(torch.empty(1, 1, 16, device=device))
    return f"attention: {kernels.__name__.rpartition('.')[2] if kernels else 'plain torch'}"


@contextmanager
def plain_torch() -> Iterator[None]:
    """Plain torch inside, whatever was asked for: for comparisons with what has no other kernels."""
    token = _only_torch.set(True)
    try:
        yield
    finally:
        _only_torch.reset(token)


def fast_kernels(query: Tensor, *, causal: bool = True, block: int | None = None) -> ModuleType | None:
    """The kernels that were asked for, if they can take these queries (..., d); else None.

    `block` is that of the global route; None asks for the local one.

    Raises:
        ValueError: DUALROUTE_KERNELS is no known name, or names kernels that cannot be had here.
    """
    wanted = os.environ.get(VARIABLE) or _default
    if wanted == "torch" or _only_torch.get():
        return None
    if wanted == "triton":
        return _triton(query, causal, block)
    if wanted not in CHOICES:
        raise ValueError(f"{VARIABLE}={wanted} is unknown: set it to {', '.join(CHOICES)}")
    kernels = importlib.import_module("dualroute.attention.cpu_kernels")
    if not kernels.available(query, causal=causal):
        return None
    reason = _why_not_compiled()
    if reason is None:
        return kernels
    if wanted == "cpp":
        raise ValueError(f"{VARIABLE}=cpp, but the kernels cannot be compiled: {reason}")
    _warn_once(reason)
    return None


@functools.cache
def _why_not_compiled() -> str | None:
    """None if the C++ kernels work, else the reason; tried once."""
    build = importlib.import_module("dualroute.attention.cpu_kernels.build")
    try:
        build.load()
    except build.BuildError as error:
        return str(error)
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"attention runs on plain torch, which is slower: {reason}", stacklevel=2)


def _triton(query: Tensor, causal: bool, block: int | None) -> ModuleType | None:
    try:
        kernels = importlib.import_module("dualroute.attention.triton_kernels")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ValueError(f"{VARIABLE}=triton, but Triton is not installed: pip install triton") from error
    usable = (
        kernels.available(query) if block is None else kernels.available(query, block=block, causal=causal)
    )
    return kernels if usable else None
