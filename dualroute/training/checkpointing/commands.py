"""``dualroute checkpoint list | verify | export | convert``: looking at checkpoints, taking them elsewhere.

In: a run folder or a checkpoint folder.  Here: what is there, whether it is whole, the weights alone
(:func:`export`), or the whole state as DeepSpeed's universal checkpoint (:func:`convert`).  Next:
``dualroute generate`` and ``evaluate`` take an exported folder as they take a checkpoint; so does anything
that reads safetensors.

An export is read back and compared, with the optimizer's weights and with those in the
checkpoint, before its folder gets its name.  A folder that is there has passed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dualroute.errors import UserError
from dualroute.files import appearing_folder
from dualroute.model import checkpoint_format
from dualroute.model.weights_file import write_weights
from dualroute.training.checkpointing.reshard import Reporter, check_room
from dualroute.training.checkpointing.state_layout import StateLayout
from dualroute.training.checkpointing.state_reader import WEIGHT, TrainingState, open_state
from dualroute.training.checkpointing.state_writer import write_universal

ExportDtype = Literal["auto", "float32", "bfloat16", "float16"]
_MODULE = "model."  # where the model sits in the LightningModule


def list_checkpoints(run: str) -> int:
    """Print one line for each checkpoint of a run; returns the exit status."""
    folder = _checkpoints_folder(run)
    links = {
        name: (folder / name).resolve().name for name in ("best", "last") if (folder / name).is_symlink()
    }
    print(f"{'checkpoint':<15} {'tokens':>14} {'train':>8} {'val':>8} {'MiB':>10}  layout")
    damaged = False
    for path in sorted(folder.glob(f"step-*/{checkpoint_format.METADATA}")):
        try:
            checkpoint = checkpoint_format.read_checkpoint(path.parent)
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
        if any(folder.glob(f"step-*/{checkpoint_format.METADATA}")):
            return folder
    raise UserError(f"there is no finished checkpoint in {run}: give a run folder")


def _mebibytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def verify(path: str) -> int:
    """Compare every file of a checkpoint, or of all checkpoints of a run, with its sha256.

    Prints one line each; returns the exit status, 1 if anything is damaged.
    """
    if (Path(path) / checkpoint_format.METADATA).is_file():
        folders = [Path(path)]
    else:
        folders = sorted(
            file.parent for file in _checkpoints_folder(path).glob(f"step-*/{checkpoint_format.METADATA}")
        )
    status = 0
    for folder in folders:
        try:
            checkpoint = checkpoint_format.read_checkpoint(folder)
            damages = list(checkpoint_format.damages(checkpoint))
        except UserError as error:
            damages = [str(error)]
        for damage in damages:
            print(f"damaged: {damage}")
            status = 1
        if not damages:
            print(f"good: {folder} ({len(checkpoint.metadata['files'])} files)")
    return status


def export(checkpoint: str, output: str, dtype: ExportDtype = "auto") -> int:
    """Write the weights of a checkpoint, its configuration and its tokenizer to a folder of their own.

    One parameter at a time is in memory, whatever the layout.  Returns the exit status.

    Args:
        checkpoint: Checkpoint or run folder (its newest checkpoint).
        output: A folder that does not exist yet.
        dtype: Of the weights; auto keeps what the optimizer steps, float32 under DeepSpeed.

    Raises:
        UserError: The checkpoint is damaged, or what was written does not compare equal.
    """
    source = checkpoint_format.find_checkpoint(checkpoint)
    checkpoint_format.verify_checkpoint(source)
    state = open_state(source)
    chosen = None if dtype == "auto" else getattr(torch, dtype)
    layout = {
        name.removeprefix(_MODULE): (chosen or state.dtype(name), shape)
        for name, shape in state.shapes.items()
        if name.startswith(_MODULE)
    }
    with appearing_folder(output) as aside:
        write_weights(aside / checkpoint_format.WEIGHTS, layout, _renamed(state, chosen))
        published = source.folder / checkpoint_format.WEIGHTS
        try:
            compared = _compare(state, chosen, aside / checkpoint_format.WEIGHTS, published)
        except SafetensorError as error:
            raise UserError(f"{published} cannot be read ({error}): use another checkpoint") from error
        for name in (checkpoint_format.CONFIG, checkpoint_format.TOKENIZER):
            shutil.copyfile(source.folder / name, aside / name)
        metadata = source.metadata | {"state_layout": None, "files": checkpoint_format.describe_files(aside)}
        (aside / checkpoint_format.METADATA).write_text(json.dumps(metadata, indent=1), encoding="utf-8")
    print(f"{output}: {compared} tensors, read back and equal to those of {source.folder}")
    return 0


def _renamed(state: TrainingState, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in _model_tensors(state):
        yield name.removeprefix(_MODULE), tensor.to(dtype or tensor.dtype)


def _model_tensors(state: TrainingState) -> Iterator[tuple[str, Tensor]]:
    """The model's part of what was trained (a distillation has projections besides)."""
    for name in state.shapes:
        if name.startswith(_MODULE):
            yield name, state.read(name, WEIGHT)


def _compare(state: TrainingState, dtype: torch.dtype | None, written: Path, published: Path) -> int:
    """Read ``written`` back; compare it with the optimizer's weights, and those with ``published``."""
    wanted = {name.removeprefix(_MODULE) for name in state.shapes if name.startswith(_MODULE)}
    with safe_open(written, "pt") as ours, safe_open(published, "pt") as theirs:
        odd = sorted((wanted ^ set(ours.keys())) | (wanted ^ set(theirs.keys())))
    if odd:
        raise UserError(f"{published} and the training state beside it differ in their parameters: {odd}")
    for name, tensor in _model_tensors(state):
        short = name.removeprefix(_MODULE)
        # opened for each tensor: what was read of a mapped file counts as memory until it is closed
        with safe_open(written, "pt") as ours, safe_open(published, "pt") as theirs:
            model = theirs.get_tensor(short)
            pairs = (
                (written, ours.get_tensor(short), tensor.to(dtype or tensor.dtype)),
                (published, model, tensor.to(model.dtype)),
            )
            for path, read, expected in pairs:
                if not torch.equal(_bits(read), _bits(expected)):
                    raise UserError(f"{path}: {short} is not the weight that the optimizer's state holds")
    return len(wanted)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def convert(checkpoint: str, output: str) -> int:
    """Write the training state of a checkpoint as a DeepSpeed universal checkpoint; returns the exit status.

    Args:
        checkpoint: Checkpoint or run folder (its newest checkpoint).
        output: A folder that does not exist yet; load it with ``checkpoint.load_universal``.

    Raises:
        UserError: The checkpoint is damaged, has no such state, or there is no room.
    """
    source = checkpoint_format.find_checkpoint(checkpoint)
    checkpoint_format.verify_checkpoint(source)
    state = open_state(source)
    with appearing_folder(output) as aside:
        check_room(state, aside)
        write_universal(state, aside, Reporter())
    layout = StateLayout.read(source)
    print(f"{output}: universal checkpoint of {source.folder} (it held {layout})")
    return 0
