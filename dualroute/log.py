"""What a command tells while it works: plain lines on the terminal, with time and rank in the run's log file.

In: ``logging.getLogger(__name__)`` of any module.  Here: :func:`to_terminal` shows the lines as they are
(information on standard output, warnings and errors on standard error); :func:`to_file` appends them, with
time, rank and level, to ``OUTPUT/log.txt``.  What a command *answers* (a table, a text, a list) is printed,
and is no log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

#: The loggers of this project.
ROOTS = ("dualroute", "data_prep")
FILE = "log.txt"


def counted(number: int, noun: str) -> str:
    """ "1 row", "2,000 rows": a number and what it counts, for a line that a person reads."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Terminal(logging.Handler):
    """Lines as they are, on whatever standard output and standard error are when a line comes."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "on_terminal", False):  # a progress bar shows it
            return
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        try:
            stream.write(self.format(record) + "\n")
            stream.flush()
        except BrokenPipeError:
            raise
        except Exception:
            self.handleError(record)


class _Plain(logging.Formatter):
    """The message; a warning says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return f"dualroute: warning: {text}" if record.levelno == logging.WARNING else text


def to_terminal() -> None:
    """Show the project's log lines on the terminal; called again, it changes nothing."""
    for name in ROOTS:
        logger = logging.getLogger(name)
        if not any(isinstance(handler, Terminal) for handler in logger.handlers):
            handler = Terminal()
            handler.setFormatter(_Plain())
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


@contextlib.contextmanager
def to_file(folder: Path, rank: int = 0, ready: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Append the log lines of this process to ``folder``/log.txt, with time, rank and level.

    Args:
        folder: The run folder.
        rank: Of this process.
        ready: Whether the folder may be written yet; lines wait for it, and are dropped if it never may.

    Each line is one write in append mode, so ranks of one host do not mix within a line.  A file that
    cannot be written (a full disk) is given up without a word after the first warning: a log must not end a
    training.
    """
    handler = _AppendingFile(folder / FILE, rank, ready)
    loggers = [logging.getLogger(name) for name in ROOTS]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


class _AppendingFile(logging.Handler):
    def __init__(self, path: Path, rank: int, ready: Callable[[], bool]) -> None:
        super().__init__()
        self._path = path
        self._descriptor: int | None = None
        self._given_up = False
        self._ready = ready
        self._waiting: list[str] = []
        self.setFormatter(
            logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
        )

    def emit(self, record: logging.LogRecord) -> None:
        if self._given_up:
            return
        self._waiting.append(" ".join(self.format(record).splitlines()) + "\n")
        if not self._ready():
            return
        lines, self._waiting = "".join(self._waiting), []
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(self._descriptor, lines.encode("utf-8", "replace"))
        except OSError as error:
            self._given_up = True
            logging.getLogger(__name__).warning("%s is not written any more (%s)", self._path, error.strerror)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        super().close()
