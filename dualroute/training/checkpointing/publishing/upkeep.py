"""Order in a run's ``checkpoints`` folder: what is in the way, what a killed process left, where links point.

Only the process that holds the run's lock calls these, and only after its state has loaded
(:mod:`~dualroute.training.checkpointing.publishing.first_write`).  What was trained is never deleted here: it
is renamed to ``abandoned-…``, which nothing finds by itself.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

from dualroute.errors import UserError
from dualroute.files import fsync_folder, write_bytes_atomically
from dualroute.model.checkpoint.folder import Checkpoint, read_checkpoint, scan_checkpoints, step_of

PUBLISHED = "published.json"
"""In the run folder: there is a checkpoint.  By it a start knows that ``checkpoints`` has gone astray."""
ABANDONED, DELETING, WRITING = "abandoned-", ".deleting-", ".writing-"
LINKS = ("last", "best")


def set_aside(path: Path) -> Path:
    """Rename ``path`` to ``abandoned-…``, beside any other of that name; its new name."""
    aside = _free(path.with_name(f"{ABANDONED}{path.name}"))
    os.rename(path, aside)
    return aside


def _free(path: Path) -> Path:
    found, number = path, 1
    while os.path.lexists(found):
        number += 1
        found = path.with_name(f"{path.name}.{number}")
    return found


def set_aside_newer(folder: Path, step: int) -> list[Path]:
    """Rename every ``step-…`` folder past ``step``, because the run goes on from an earlier one.

    Half-copied and damaged ones too, the newest first: cut short, what remains is a run that ended earlier.
    """
    found = [(number, path) for path in folder.glob("step-*") if (number := step_of(path)) is not None]
    moved = [set_aside(path) for number, path in sorted(found, reverse=True) if number > step]
    if moved:
        point_links(folder)
        fsync_folder(folder)
    return moved


def best_by_validation(checkpoints: list[Checkpoint]) -> dict[str, Checkpoint]:
    """The checkpoint of lowest validation loss, or best by its task's metric, the earlier of equals, for each
    thing it was measured on.

    In the order of the newest of each; losses and metrics that are no numbers do not count.
    """
    best: dict[str, Checkpoint] = {}
    for checkpoint in sorted(checkpoints, key=lambda c: c.step):
        value = checkpoint.to_minimise
        if value is None or not math.isfinite(value):
            continue
        by = (checkpoint.metadata.get("score") or {}).get("name")
        measured_on = json.dumps([checkpoint.metadata.get("validation"), by], sort_keys=True)
        other = best.pop(measured_on, None)
        best[measured_on] = other if other is not None and other.to_minimise <= value else checkpoint  # type: ignore[operator]
    return best


def point_links(folder: Path) -> None:
    """Have ``last`` and ``best`` name what is there; a link to what is not there goes."""
    finished = scan_checkpoints(folder).finished
    best = [*best_by_validation(finished).values()]  # the last: measured as the newest loss was
    targets = (finished[-1] if finished else None, best[-1] if best else None)
    for name, target in zip(LINKS, targets, strict=True):
        if target is not None:
            point(folder / name, target.folder.name)
        elif (folder / name).is_symlink() and not (folder / name).exists():
            (folder / name).unlink()


def point(link: Path, target: str) -> None:
    """Make ``link`` a symbolic link to ``target``.

    A folder of that name (``scp -r`` and some archivers copy what a link points to) makes room: it is deleted
    where the ``step-…`` folder that it is a copy of lies beside it, else set aside.
    """
    if link.is_dir() and not link.is_symlink():
        if _has_original(link):
            remove(link)
        else:
            set_aside(link)
    aside = link.with_name(f".{link.name}.new")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    os.replace(aside, link)


def _has_original(copy: Path) -> bool:
    try:
        theirs = read_checkpoint(copy).metadata
        return any(c.metadata == theirs for c in scan_checkpoints(copy.parent).finished)
    except UserError:  # unfinished or damaged
        return False


def remove(folder: Path) -> None:
    """Delete a folder under a hidden name, so that a deletion cut short leaves no half of it behind."""
    doomed = _free(folder.with_name(f"{DELETING}{folder.name}"))
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path, *, keep: Path | None = None) -> None:
    """Delete what killed processes left in ``folder``: half-written, half-deleted and old converted states.

    Args:
        folder: The run's ``checkpoints`` folder.
        keep: A converted state that is in use.
    """
    for name in LINKS:
        (folder / f".{name}.new").unlink(missing_ok=True)
    for pattern in (f"{DELETING}*", f"{WRITING}*", "resharded-*"):
        for path in folder.glob(pattern):
            if path != keep:
                shutil.rmtree(path, ignore_errors=True)


def note_published(run: Path, step: int) -> None:
    """Write down, once, that this run has a checkpoint."""
    if not (run / PUBLISHED).exists():
        write_bytes_atomically(run / PUBLISHED, json.dumps({"first_checkpoint": step}).encode())
