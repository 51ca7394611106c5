"""Objects of Python behind a tensor, so that they pass through a compiled graph that knows only tensors.

In: any object. Out: `hold` gives a tensor (1,) of int64 on the CPU, `held` the object again.

The tensor's memory is a buffer that owns the object. So the object lives exactly as long as some tensor that
shares that memory does: an input of a graph, or what a graph has saved for its backward pass. A copy of the
number, on another device or in another process, owns nothing.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

BYTES = 8  # of the number


class _Owner(bytearray):
    """The memory of one tensor, and the object that lives as long."""

    value: Any = None


_numbers = itertools.count(1)
_owners: WeakValueDictionary[int, _Owner] = WeakValueDictionary()


def hold(value: Any) -> Tensor:
    """A tensor that stands for `value`."""
    number = next(_numbers)
    owner = _Owner(number.to_bytes(BYTES, "little"))
    owner.value = value
    _owners[number] = owner
    return torch.frombuffer(owner, dtype=torch.int64)


def held(tensor: Tensor) -> Any:
    """What `tensor`, of `hold`, stands for.

    Raises:
        ValueError: no tensor of `hold` with this number is left: this one is a copy.
    """
    owner = _owners.get(int(tensor))
    if owner is None:
        raise ValueError(
            f"the tensor {int(tensor)} is a copy of one that stood for an object: pass the tensor itself, on "
            "the CPU and in the process that made it"
        )
    return owner.value
