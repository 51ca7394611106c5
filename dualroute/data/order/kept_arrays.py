"""Arrays that take long to work out, kept in a folder for the other processes and the next start.

In: a place that is named by all that decides the arrays.  Here: one process works them out while the others
wait; they appear together by rename, with the sha256 of each.  Out: memory maps, which processes of a machine
share.  Where nothing can be written, or what was written is damaged, each works them out for itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dualroute.errors import UserError
from dualroute.files import file_sha256, found_or_made, read_json

Arrays = dict[str, NDArray[np.integer]]
_NOTE = "arrays.json"


def kept_arrays(place: Path, compute: Callable[[], Arrays]) -> Arrays:
    """The arrays of a place, worked out by the first who asks for them.

    Args:
        place: Named by what decides the arrays; its parent may be missing.
        compute: Works them out; the same names and values each time.
    """
    computed: list[Arrays] = []

    def make(aside: Path) -> None:
        computed.append(compute())
        for name, values in computed[0].items():
            np.save(aside / f"{name}.npy", values)
        note = {name: file_sha256(aside / f"{name}.npy") for name in computed[0]}
        (aside / _NOTE).write_text(json.dumps(note), encoding="ascii")

    try:
        return found_or_made(place, lambda: _read(place), make, "the folder")[0]
    except (OSError, UserError):  # a folder that cannot be written, a full disk
        return computed[0] if computed else compute()


def _read(place: Path) -> Arrays | None:
    """What is there, null where that is nothing or not what was written."""
    try:
        note = read_json(place / _NOTE)
        if not note or any(file_sha256(place / f"{name}.npy") != sha256 for name, sha256 in note.items()):
            return None
        return {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in note}
    except (OSError, UserError, ValueError, AttributeError):
        return None
