"""How data sets that lie elsewhere are read, and what becomes of damaged data; see
`dualroute.data.remote`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

GIB = 1 << 30
DEFAULT_CACHE_GIB = 64.0


def default_cache_folder() -> str:
    """``$DUALROUTE_CACHE``, else ``dualroute/shards`` in the user's cache folder."""
    if folder := os.environ.get("DUALROUTE_CACHE"):
        return folder
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualroute" / "shards")


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
    cache_gib: float = DEFAULT_CACHE_GIB
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
