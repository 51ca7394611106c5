"""What a person sees while the work goes on: a bar on a terminal, a line every few seconds elsewhere.

Everything goes to stderr, so that stdout stays free for results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 5.0


class Phase:
    """One stretch of work; `update` as often as you like."""

    def __init__(self, reporter: Reporter, title: str, total: int | None) -> None:
        self._reporter, self._title, self._total = reporter, title, total
        self._started = time.monotonic()
        self._next_line = self._started + _SECONDS_BETWEEN_LINES
        self._bar: Progress | None = None
        if reporter.enabled and reporter.console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=reporter.console,
            )
            self._task = self._bar.add_task(title, total=total, detail="")
            self._bar.start()

    def update(
        self, done: int, documents: int | None = None, tokens: int | None = None, total: int | None = None
    ) -> None:
        """Report ``done`` bytes (of ``total``, if that became known), documents and tokens so far."""
        self._total = total if total is not None else self._total
        if not self._reporter.enabled:
            return
        if self._bar is not None:
            detail = _detail(done, documents, tokens)
            self._bar.update(self._task, completed=done, total=self._total, detail=detail)
        elif (now := time.monotonic()) >= self._next_line:
            self._next_line = now + _SECONDS_BETWEEN_LINES
            left = ""
            if self._total and done:
                seconds = (now - self._started) * (self._total - done) / done
                left = f", {100 * done / self._total:.0f} %, {seconds:.0f} s left"
            self._reporter.note(f"{self._title}: {_detail(done, documents, tokens)}{left}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class Reporter:
    """Where phases and notes go.

    Args:
        enabled: False keeps silent.
        console: for tests; the default writes to stderr.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None) -> None:
        self.enabled = enabled
        self.console = console or Console(stderr=True)

    def download(self, title: str) -> Callable[[int, int | None], None]:
        """A callback for (bytes so far, total bytes or None), with a phase that ends when all has arrived."""
        phase: Phase | None = None

        def report(done: int, total: int | None) -> None:
            nonlocal phase
            phase = phase or Phase(self, title, total)
            phase.update(done, total=total)
            if total is not None and done >= total:
                phase.close()

        return report

    def note(self, text: str) -> None:
        """One line for the log. What a file name could do to a terminal is shown instead of done."""
        if self.enabled:
            plain = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
            self.console.print(plain, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def phase(self, title: str, total: int | None = None) -> Iterator[Phase]:
        """A phase of ``total`` bytes (None: not known yet)."""
        phase = Phase(self, title, total)
        try:
            yield phase
        finally:
            phase.close()


def _detail(done: int, documents: int | None, tokens: int | None) -> str:
    parts = [f"{documents:,} documents"] if documents is not None else []
    parts.append(f"{done / 1e6:,.1f} MB")
    if tokens is not None:
        parts.append(f"{tokens / 1e6:,.2f} M tokens")
    return ", ".join(parts)
