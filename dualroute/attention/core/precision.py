"""Types of numbers, and the modes of torch that change tensors behind one's back.

In: a type, factors of a product, or a function of tensors. Out: the type that sums over many numbers are
taken in; the product with sums of that type; the function without autocast, or outside of inference mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

HALF = (torch.float16, torch.bfloat16)
NEG_INF = float("-inf")  # the logit of a key that a query may not see


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else: the type of log-sum-exps and of sums over tiles."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_wide_product(rows: Tensor) -> bool:
    """CUDA can keep the float32 sums of a product of half-precision factors."""
    return rows.is_cuda and rows.dtype in HALF


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left (..., m, k) @ right (..., k, n) in `accumulation_dtype`: half-precision factors are multiplied as
    they are, and neither the sums nor the result are rounded to their type."""
    if has_wide_product(left):
        batch = left.shape[:-2]
        product = torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out_dtype=torch.float32)
        return product.unflatten(0, batch)
    wide = accumulation_dtype(left.dtype)
    return left.to(wide) @ right.to(wide)


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` with autocast off: the routes choose their own precision, tile by tile."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        given = (arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))
        kind = next((arg.device.type for arg in given), "cpu")
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function`, which has no gradients, where `torch.inference_mode` is off.

    For tensors that are kept: one that was made in inference mode can neither be saved for a backward pass
    nor written to once that mode has ended.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return wrapped
