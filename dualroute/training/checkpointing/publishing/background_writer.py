"""Writing a checkpoint while training goes on.

In: a part of the training state at a step boundary.  Here: :func:`copy_to_host` copies it to the memory of
the host; :class:`BackgroundWriter` runs one job at a time in a thread.  Next:
``training/checkpointing/publishing/publisher.py`` gives it the job of writing that copy, and on rank 0 of
publishing.

A failed job is raised in the training thread, at the next boundary or at the end, never
lost; and the thread is no daemon, so a process that ends, also by an exception, ends after its write.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

_UNCHANGING = (str, bytes, int, float, complex, type(None), torch.Size, torch.dtype, torch.device, type)


def copy_to_host(value: Any) -> Any:
    """``value`` with everything in it that may change copied to the CPU; to pinned memory from a GPU.

    Tensors that were one (tied weights) stay one.
    """
    copies: dict[Any, Tensor] = {}
    copied = _copy(value, copies)
    if torch.cuda.is_available() and any(tensor.is_pinned() for tensor in copies.values()):
        torch.cuda.synchronize()
    return copied


def _copy(value: Any, copies: dict[Any, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensor = value.detach()
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0 or key not in copies:
            copies[key] = _on_host(tensor)
        return copies[key]
    if isinstance(value, dict):
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        return kind((key, _copy(item, copies)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_copy(item, copies) for item in value)
    # a loss scaler of DeepSpeed, say, which the next step changes
    return value if isinstance(value, _UNCHANGING) else deepcopy(value)


def _on_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.to("cpu", copy=True)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


class BackgroundWriter:
    """Runs one job at a time in a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Start ``job``, after the one before has ended; raises what that one raised."""
        self.wait()

        def run() -> None:
            try:
                job()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint writer")
        self._thread.start()

    def raise_failure(self) -> None:
        """Raise what a job raised, once; does not wait."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Return when no job runs; raises what the last one raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_failure()
