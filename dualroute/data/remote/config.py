"""How data sets that lie elsewhere are read, and what becomes of damaged data; see
`dualroute.data.remote`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dualroute.errors import UserError

GIB = 1 << 30


def default_cache_folder() -> str:
    """``$DUALROUTE_CACHE``, else ``dualroute/shards`` in the user's cache folder."""
    if folder := os.environ.get("DUALROUTE_CACHE"):
        return folder
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualroute" / "shards")


def default_cache_gib() -> float:
    """``$DUALROUTE_CACHE_GIB``, else 64.

    Raises:
        UserError: it is set to what is no number above 0.
    """
    text = os.environ.get("DUALROUTE_CACHE_GIB", "64")
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < 1e9:
        raise UserError(f"DUALROUTE_CACHE_GIB is {text!r}: set it to a number of GiB above 0")
    return size


@dataclass(frozen=True)
class RemoteOptions:
    """Where copies are kept and how patiently they are fetched.

    Attributes:
        cache_dir: folder of the copies; on a disk of the node.
        cache_gib: GiB that it may hold, over all sets.
        timeout: seconds without an answer, or with less than 1 KiB/s, after which an attempt has failed.
        retries: further attempts after one that failed; those that got ahead are not counted.
        retry_seconds: before the first of them; doubled each time up to 30 s, and shortened or lengthened by
            chance so that ranks do not ask together.
    """

    cache_dir: str = field(default_factory=default_cache_folder)
    cache_gib: float = field(default_factory=default_cache_gib)
    timeout: float = 60.0
    retries: int = 8
    retry_seconds: float = 1.0

    @property
    def cache_bytes(self) -> int:
        """``cache_gib`` in bytes."""
        return int(self.cache_gib * GIB)


@dataclass(frozen=True)
class BadDataPolicy:
    """What becomes of a window whose shard is damaged or cannot be had.

    Attributes:
        on_bad_data: ``fail``, or ``skip``: the window is padding, and its labels do not count.
        max_bad_windows: so many may be skipped by a rank in one start; one more ends the run.
    """

    on_bad_data: Literal["fail", "skip"] = "fail"
    max_bad_windows: int = 100
