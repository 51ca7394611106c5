"""Which checkpoint a run starts from.

In: the run's ``checkpoints`` folder and what ``--resume`` says.  Here: it is chosen and verified.  Next:
:mod:`~dualroute.training.checkpointing.reshard` makes it readable for the ranks of this start.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dualroute.errors import UserError
from dualroute.model import checkpoint_format
from dualroute.model.config import ModelConfig


def choose_resume(
    folder: Path, resume: str, model: ModelConfig, *, digests: bool
) -> checkpoint_format.Checkpoint | None:
    """The checkpoint that a run starts from, or None for a fresh start.

    Args:
        folder: The run's ``checkpoints`` folder.
        resume: ``auto`` (newest finished one, if any), ``never``, or a path.
        model: The configured model, compared with the checkpoint's.
        digests: Verify sha256 besides sizes.

    Raises:
        UserError: ``resume`` names nothing, the checkpoint is damaged, or its model has another shape.
    """
    finished = checkpoint_format.list_checkpoints(folder) if folder.is_dir() else []
    if resume == "never":
        if finished:
            raise UserError(
                f"{folder} holds {len(finished)} finished checkpoint(s) and --resume never would write over "
                f"them: choose another --output, or remove the folder"
            )
        return None
    if resume == "auto" and not finished:
        return None
    checkpoint = finished[-1] if resume == "auto" else checkpoint_format.find_checkpoint(resume)
    _verify(checkpoint, digests=digests)
    theirs = ModelConfig.from_file(checkpoint.folder / checkpoint_format.CONFIG).to_dict()
    ours = model.to_dict()
    differing = [f"{key} {theirs[key]} → {ours[key]}" for key in ours if theirs[key] != ours[key]]
    if differing:
        raise UserError(
            f"{checkpoint.folder} holds another model than the configuration asks for (model."
            f"{', model.'.join(differing)}): restore these values, or start elsewhere with --output"
        )
    return checkpoint


def _verify(checkpoint: checkpoint_format.Checkpoint, *, digests: bool) -> None:
    """Refuse a damaged checkpoint, and name the newest older one beside it that is whole."""
    damage = next(checkpoint_format.damages(checkpoint, digests=digests), None)
    if damage is None:
        return
    beside = checkpoint_format.list_checkpoints(checkpoint.folder.parent)
    for earlier in reversed([c for c in beside if c.step < checkpoint.step]):
        if not any(checkpoint_format.damages(earlier, digests=digests)):
            raise UserError(f"{damage}; the newest earlier checkpoint is whole: --resume {earlier.folder}")
    raise UserError(f"{damage}; no earlier checkpoint beside it is whole: start again with another --output")


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename checkpoints past ``step`` in ``folder``, because the run goes on from an earlier one.

    They stay on the disk as ``abandoned-step-…``; nothing finds them by itself any more.
    """
    for checkpoint in checkpoint_format.list_checkpoints(folder):
        if checkpoint.step > step:
            aside = checkpoint.folder.with_name(f"abandoned-{checkpoint.folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(checkpoint.folder, aside)
