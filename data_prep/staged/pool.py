"""Cleaning in several processes, results in the order of the work.

Threads would wait for each other: the rules are Python. The processes are forked where the system can, so
that models and n-grams are in memory once; they end with the one that made them, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cleaning.stage import Cleaner, CleaningOptions, Outcome
from data_prep.staged.lots import Batch
from dualroute.errors import UserError

Cleaned = tuple[list[Outcome], NDArray[np.uint32]]

_HELD_CHARS = 1 << 26  # of text that waits for its turn, beyond a batch for each process
_cleaner: Cleaner | None = None


def _begin(options: CleaningOptions, reading: int, writing: int) -> None:
    """In a process of the pool: have a cleaner, and end when the other end of the pipe is closed."""
    global _cleaner
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that leads the work answers it
    if writing >= 0:
        os.close(writing)

        def watch() -> None:
            os.read(reading, 1)
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
    if _cleaner is None or _cleaner.options != options:
        _cleaner = Cleaner(options)


def _clean(batch: Batch) -> Cleaned:
    assert _cleaner is not None  # `_begin` has made it
    return _cleaner.clean(batch.documents)


class Killed(UserError):
    """A process died; what is finished is sound, and another run goes on from it."""


class Pool:
    """Processes that clean; a context.

    Args:
        cleaner: with the options that all of them work by.
        workers: 1 works in this process.
    """

    def __init__(self, cleaner: Cleaner, workers: int) -> None:
        self._cleaner, self._workers = cleaner, workers
        self._executor: ProcessPoolExecutor | None = None
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> Pool:
        global _cleaner
        if self._workers > 1:
            forked = sys.platform == "linux"
            context = multiprocessing.get_context("fork" if forked else "spawn")
            self._pipe = os.pipe() if forked else None
            _cleaner = self._cleaner  # what a fork inherits
            ends = self._pipe or (-1, -1)
            arguments = (self._cleaner.options, *ends)
            self._executor = ProcessPoolExecutor(self._workers, context, _begin, arguments)
        return self

    def __exit__(self, *error: Any) -> None:
        global _cleaner
        _cleaner = None
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        for end in self._pipe or ():
            with suppress(OSError):
                os.close(end)

    def clean(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Cleaned]]:
        """(batch, outcomes and signatures), in order; few batches are held at a time.

        Raises:
            Killed: a process died, as the system lets it where memory is used up.
        """
        if self._executor is None:
            for batch in batches:
                yield batch, self._cleaner.clean(batch.documents)
            return
        pending: deque[tuple[Batch, int, Future[Cleaned]]] = deque()
        held = 0
        try:
            for batch in batches:
                size = sum(len(document.text) for document in batch.documents)
                pending.append((batch, size, self._executor.submit(_clean, batch)))
                held += size
                while len(pending) > 2 * self._workers or (
                    len(pending) > self._workers and held > _HELD_CHARS
                ):
                    first, size, future = pending.popleft()
                    held -= size
                    yield first, future.result()
            while pending:
                first, _, future = pending.popleft()
                yield first, future.result()
        except BrokenProcessPool as error:
            raise Killed(
                "a process that cleans documents was killed, as the system does where memory is used up; "
                "use fewer workers, and run again (it continues)"
            ) from error
        finally:
            for _, _, future in pending:
                future.cancel()
