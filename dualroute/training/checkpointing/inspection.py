"""``dualroute checkpoint list | verify``: looking at checkpoints, without torch and its seconds of imports.

In: a run folder or a checkpoint folder.  Here: what is there, and whether it is whole.
"""

from __future__ import annotations

from pathlib import Path

from dualroute.errors import UserError
from dualroute.model import checkpoint_folder


def list_checkpoints(run: str) -> int:
    """Print one line for each checkpoint of a run; returns the exit status."""
    folder = _checkpoints_folder(run)
    links = {
        name: (folder / name).resolve().name for name in ("best", "last") if (folder / name).is_symlink()
    }
    print(f"{'checkpoint':<15} {'tokens':>14} {'train':>8} {'val':>8} {'MiB':>10}  layout")
    damaged = False
    for path in sorted(folder.glob(f"step-*/{checkpoint_folder.METADATA}")):
        try:
            checkpoint = checkpoint_folder.read_checkpoint(path.parent)
        except UserError as error:
            damaged = True
            print(f"{path.parent.name:<15} {error}")
            continue
        said = checkpoint.metadata
        losses = [
            f"{value:.4f}" if value is not None else ""
            for value in (said.get("train_loss"), checkpoint.val_loss)
        ]
        print(
            f"{checkpoint.folder.name:<15} {said.get('tokens', 0):>14,} {losses[0]:>8} {losses[1]:>8} "
            f"{_mebibytes(checkpoint.folder):>10,.1f}  {said.get('state_layout') or 'weights only'}"
            + "".join(f"  ← {name}" for name, target in links.items() if target == checkpoint.folder.name)
        )
    for pattern, what in (
        ("abandoned-*", "set aside"),
        ("resharded-*", "converted"),
        (".writing-*", "unfinished"),
    ):
        for path in sorted(folder.glob(pattern)):
            print(f"{what}: {path.name} ({_mebibytes(path):,.1f} MiB)")
    return int(damaged)


def _checkpoints_folder(run: str) -> Path:
    for folder in (Path(run) / "checkpoints", Path(run)):
        if any(folder.glob(f"step-*/{checkpoint_folder.METADATA}")):
            return folder
    raise UserError(f"there is no finished checkpoint in {run}: give a run folder")


def _mebibytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def verify(path: str) -> int:
    """Compare every file of a checkpoint, or of all checkpoints of a run, with its sha256.

    Prints one line each; returns the exit status, 1 if anything is damaged.
    """
    if (Path(path) / checkpoint_folder.METADATA).is_file():
        folders = [Path(path)]
    else:
        folders = sorted(
            file.parent for file in _checkpoints_folder(path).glob(f"step-*/{checkpoint_folder.METADATA}")
        )
    status = 0
    for folder in folders:
        try:
            checkpoint = checkpoint_folder.read_checkpoint(folder)
            damages = list(checkpoint_folder.damages(checkpoint))
        except UserError as error:
            damages = [str(error)]
        for damage in damages:
            print(f"damaged: {damage}")
            status = 1
        if not damages:
            print(f"good: {folder} ({len(checkpoint.metadata['files'])} files)")
    return status
