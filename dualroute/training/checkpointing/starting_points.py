"""What a checkpoint descends from: the starting points that were named on the way to it.

A path given as ``--resume`` is a starting point once.  Every checkpoint that is trained from there carries it
in its ``checkpoint.json``, so that the same command, run again (after a signal, by Slurm after a requeue),
goes on from the newest of them and not from the path once more.

    "resumed_from": [{"given": "checkpoints/step-00000003", "id": "9f…", "step": 3}, …]     oldest first

It stands in the checkpoints and not in the run folder: going back to an earlier checkpoint goes back in this
list too, and a copied folder takes it along.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dualroute.errors import UserError
from dualroute.files import file_sha256
from dualroute.model.checkpoint_folder import METADATA, Checkpoint, find_checkpoint

KEY = "resumed_from"
#: {"given": as :func:`spelled`, "id": as :func:`identity` or "", "step": of the checkpoint}
StartingPoint = dict[str, Any]


def identity(checkpoint: Checkpoint) -> str:
    """What tells a checkpoint from any other, wherever it lies: its metadata hold the hash of every file."""
    return file_sha256(checkpoint.folder / METADATA)


def spelled(given: str, folder: Path) -> str:
    """``given`` in the form that is compared: below the run it is relative, so that a run may be moved.

    Links are followed but for the last name, so that ``checkpoints/best`` stays what was said.

    Args:
        given: A path, as of ``--resume``.
        folder: The run's ``checkpoints`` folder.
    """
    absolute = Path(os.path.abspath(given))
    path = Path(os.path.realpath(absolute.parent)) / absolute.name
    own = Path(os.path.realpath(folder))
    return f"checkpoints/{path.relative_to(own)}" if path.is_relative_to(own) else str(path)


def lineage_of(checkpoint: Checkpoint) -> list[StartingPoint]:
    """The starting points of ``checkpoint``, oldest first; none where the metadata name none."""
    said = checkpoint.metadata.get(KEY)
    return [dict(e) for e in said if isinstance(e, dict)] if isinstance(said, list) else []


def gone_on_from(newest: Checkpoint, given: str, folder: Path) -> bool:
    """Whether ``newest``, the run's newest checkpoint, descends from a start at ``given``.

    The place may be empty by now: retention removes old checkpoints, and other runs move.
    """
    name, lineage = spelled(given, folder), lineage_of(newest)
    if any(point.get("given") == name for point in lineage):
        return True
    try:
        same = identity(find_checkpoint(given))
    except (UserError, OSError):
        return False
    return any(point.get("id") == same for point in lineage)


def after(checkpoint: Checkpoint, given: str, folder: Path) -> list[StartingPoint]:
    """The lineage of what is trained from ``checkpoint``, which ``given`` has named."""
    point = {
        "given": spelled(given, folder),
        "id": identity(checkpoint),
        "step": checkpoint.step,
    }
    return [*lineage_of(checkpoint), point]


def begun_by_this_job(newest: Checkpoint) -> bool:
    """Whether this very Slurm job began the training: then it was requeued, and is to go on.

    ``--resume never`` stands in the script of a job, which Slurm runs again.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    return bool(job) and {"given": "never", "id": job, "step": 0} in lineage_of(newest)


def beginning() -> list[StartingPoint]:
    """The lineage of a training from the beginning that ``--resume never`` has asked for."""
    return [{"given": "never", "id": os.environ.get("SLURM_JOB_ID", ""), "step": 0}]
