"""``dualroute runs clean``: what no run will ever use is removed, after it was shown and agreed to.

That is: folders of runs that ended without a finished checkpoint, and, in runs that are not running,
checkpoints that were not finished and temporary files.  A run that may be alive, here or elsewhere, is left
alone.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from dualroute.errors import UserError, printable
from dualroute.model.checkpoint.folder import scan_checkpoints
from dualroute.training.runs.config import CleanRunsConfig
from dualroute.training.runs.state import find_runs, read_run

_ENDED = ("finished", "diverged", "failed", "stopped", "empty")


@dataclass(frozen=True)
class Leftover:
    """Something to remove."""

    path: Path
    why: str
    bytes: int


def clean_runs(config: CleanRunsConfig) -> int:
    """Show what can go, ask, and remove it.

    Raises:
        UserError: The folder is none, or nobody can be asked.
    """
    found = leftovers(Path(config.folder))
    if not found:
        print(f"there is nothing to remove in {config.folder}")
        return 0
    for one in found:
        print(f"{size(one.bytes):>10}  {printable(str(one.path))}  ({one.why})")
    print(f"{size(sum(one.bytes for one in found)):>10}  in all")
    if not config.yes:
        if not sys.stdin.isatty():
            raise UserError("nothing was removed, since nobody can be asked: give --yes")
        if input("remove them? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return 1
    for one in found:
        shutil.rmtree(one.path) if one.path.is_dir() else one.path.unlink(missing_ok=True)
    print("removed")
    return 0


def leftovers(folder: Path) -> list[Leftover]:
    """What can go beneath ``folder``."""
    found = []
    for place in find_runs(folder):
        run = read_run(place)
        if run.state not in _ENDED:
            continue
        scan = scan_checkpoints(place / "checkpoints")
        if run.checkpoint is None and not scan.damaged:
            found.append(Leftover(place, f"{run.state}, without a checkpoint", _bytes(place)))
            continue
        found += [
            Leftover(path, "a checkpoint that was not finished", _bytes(path)) for path in scan.unfinished
        ]
        partial = [path for path in place.rglob(".*.partial-*") if path.is_file() and not path.is_symlink()]
        found += [Leftover(path, "half-written", _bytes(path)) for path in partial]
    return found


def _bytes(path: Path) -> int:
    if not path.is_dir():
        return path.lstat().st_size
    return sum(
        os.lstat(os.path.join(base, name)).st_size for base, _, names in os.walk(path) for name in names
    )


def size(count: float) -> str:
    """In the largest unit that leaves a number of at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
