"""TensorBoard's event files, without which a training can go on.

In: the logger of a Trainer.  Here: :class:`TensorBoard` is Lightning's, except that a disk that is full or
away costs the curves and not the run: one warning names the folder, and nothing more is written in this
start (``metrics.jsonl`` has the same figures).  Next: ``training/monitoring/monitor.py`` writes through it.
"""

from __future__ import annotations

import threading
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn


class TensorBoard(TensorBoardLogger):
    """Lightning's logger; see the module's docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lasting: LastingWriter | None = None
        _let_its_thread_die_quietly()

    @property
    def experiment(self) -> Any:
        """The writer, on rank zero; it raises no OSError."""
        if self._lasting is None:
            self._lasting = LastingWriter(lambda: super(TensorBoard, self).experiment, self.log_dir)
        return self._lasting

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the monitor writes the whole configuration."""

    def save(self) -> None:
        """Flush; upstream also writes a file of hyperparameters, of which there are none here."""
        self.experiment.flush()


class LastingWriter:
    """A SummaryWriter whose methods do nothing once the disk has refused one of them.

    Args:
        make: Makes the writer, which opens its file, or gives a rank that writes nothing its dummy.
        folder: Where it writes, for the warning.
    """

    def __init__(self, make: Any, folder: str) -> None:
        self._folder = folder
        self._writer: Any = None
        self._writer = self._try(make)

    def _try(self, action: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return action(*args, **kwargs)
        except OSError as error:
            problem = error.strerror or str(error) or type(error).__name__
            rank_zero_warn(
                f"{self._folder} cannot be written ({problem}): make room there; training goes on without "
                f"TensorBoard until it is started again, and metrics.jsonl has the same figures"
            )
            self._writer = None
            return None

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._writer is None:
                return None
            return self._try(getattr(self._writer, name), *args, **kwargs)

        return call

    def add_event(self, event: Any, step: int) -> None:
        """Write an event of TensorBoard's own kind."""
        if self._writer is not None:
            self._try(self._writer.file_writer.add_event, event, step)

    def add_summary(self, summary: Any) -> None:
        """Write a summary of a plugin."""
        if self._writer is not None:
            self._try(self._writer.file_writer.add_summary, summary)


def _let_its_thread_die_quietly() -> None:
    """The thread that writes leaves its OSError to the next call of the writer, and prints it besides."""
    before = threading.excepthook
    if getattr(before, "of_tensorboard", False):
        return

    def hook(args: Any) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
            before(args)

    hook.of_tensorboard = True  # type: ignore[attr-defined]
    threading.excepthook = hook
