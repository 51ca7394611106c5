"""One finding of ``dualroute doctor``: a verdict, what was found, and what to do about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Verdict:
    """A line: ``level`` of ``name``, what was ``found``, and the ``remedy`` unless it is ok."""

    level: Level
    name: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.level:<5} {self.name:<12} {' '.join(self.found.split())}"
        return text + (f" -> {self.remedy}" if self.remedy else "")


def ok(name: str, found: str) -> Verdict:
    return Verdict("ok", name, found)


def warn(name: str, found: str, remedy: str) -> Verdict:
    return Verdict("warn", name, found, remedy)


def fail(name: str, found: str, remedy: str) -> Verdict:
    return Verdict("FAIL", name, found, remedy)


def guarded(name: str, check: Callable[[], Iterable[Verdict]]) -> Iterator[Verdict]:
    """The verdicts of a check; an error of its own is a verdict too, and the other checks go on."""
    started = time.monotonic()
    try:
        yield from check()
    except Exception as error:
        yield fail(
            name,
            f"the check ended with {type(error).__name__}: {str(error).strip().splitlines()[:1]} "
            f"after {time.monotonic() - started:.0f} s",
            "this is not meant to happen on a sound machine: read the message, report it if it says nothing",
        )
