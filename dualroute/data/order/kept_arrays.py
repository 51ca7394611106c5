"""Arrays that take long to work out, kept in a folder for the other processes and the next start.

In: a place that is named by all that decides the arrays.  Here: one process works them out while the others
wait; they appear together by rename, with the sha256 of each.  Out: memory maps, which processes of a machine
share.  Where nothing can be written, or what was written is damaged, each works them out for itself.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dualroute.errors import UserError
from dualroute.files import appearing_folder, file_sha256, locked, read_json

Arrays = dict[str, NDArray[np.integer]]
_NOTE = "arrays.json"


def kept_arrays(place: Path, compute: Callable[[], Arrays]) -> Arrays:
    """The arrays of a place, worked out by the first who asks for them.

    Args:
        place: Named by what decides the arrays; its parent may be missing.
        compute: Works them out; the same names and values each time.
    """
    found = _read(place)
    if found is not None:
        return found
    arrays: Arrays | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place.with_name(f".{place.name}.lock"), wait=math.inf):
            found = _read(place)
            if found is not None:  # another one has worked them out meanwhile
                return found
            shutil.rmtree(place, ignore_errors=True)
            arrays = compute()
            _write(place, arrays)
    except (OSError, UserError):  # a folder that cannot be written, a full disk
        return compute() if arrays is None else arrays
    return _read(place) or arrays


def _write(place: Path, arrays: Arrays) -> None:
    with appearing_folder(place, "the folder") as aside:
        for name, values in arrays.items():
            np.save(aside / f"{name}.npy", values)
        note = {name: file_sha256(aside / f"{name}.npy") for name in arrays}
        (aside / _NOTE).write_text(json.dumps(note), encoding="ascii")


def _read(place: Path) -> Arrays | None:
    """What is there, null where that is nothing or not what was written."""
    try:
        note = read_json(place / _NOTE)
        if not note or any(file_sha256(place / f"{name}.npy") != sha256 for name, sha256 in note.items()):
            return None
        return {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in note}
    except (OSError, UserError, ValueError, AttributeError):
        return None
