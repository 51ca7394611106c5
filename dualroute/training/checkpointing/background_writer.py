"""Writing a checkpoint while training goes on.

In: the Trainer's state at a step boundary.  Here: :class:`StateCapture` takes it in place of the file that
would be written, as a copy in the memory of the host; :class:`BackgroundWriter` runs one job at a time
in a thread.  Next: ``training/checkpointing/publisher.py`` gives it the job of writing and publishing that
copy.

A failed job is raised in the training thread, at the next boundary or at the end, never
lost; and the thread is no daemon, so a process that ends, also by an exception, ends after its write.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import Tensor


class StateCapture(TorchCheckpointIO):
    """Keeps what it is asked to save, as a copy on the CPU.

    Attributes:
        state: The copy, or None on a rank that saves nothing.
    """

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.state = copy_to_host(checkpoint, {})


def copy_to_host(value: Any, copies: dict[Any, Tensor]) -> Any:
    """``value`` with every tensor in it copied; tensors that were one (tied weights) stay one."""
    if isinstance(value, Tensor):
        tensor = value.detach()
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0 or key not in copies:
            copies[key] = tensor.to("cpu", copy=True)
        return copies[key]
    if isinstance(value, dict):
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        return kind((key, copy_to_host(item, copies)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(copy_to_host(item, copies) for item in value)
    return value


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
