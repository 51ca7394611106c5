"""``dualroute checkpoint export | convert``: taking checkpoints elsewhere.

In: a run folder or a checkpoint folder.  Here: the weights alone (:func:`export`), or the whole state as
DeepSpeed's universal checkpoint (:func:`convert`).  Next: ``dualroute generate`` and ``evaluate`` take an
exported folder as they take a checkpoint; so does anything that reads safetensors.

An export is read back and compared, with the optimizer's weights and with those in the
checkpoint, before its folder gets its name.  A folder that is there has passed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dualroute.errors import UserError
from dualroute.files import appearing_folder
from dualroute.model.checkpoint import folder as checkpoint_folder
from dualroute.model.checkpoint.weights_file import TensorFile, write_weights
from dualroute.training.checkpointing.state.layout import StateLayout
from dualroute.training.checkpointing.state.reader import WEIGHT, TrainingState, open_state
from dualroute.training.checkpointing.state.reshard import Reporter, check_room
from dualroute.training.checkpointing.state.writer import write_universal
from dualroute.training.finetuning.adapted import is_adapter, own_name

ExportDtype = Literal["auto", "float32", "bfloat16", "float16"]
_MODULE = "model."  # where the model sits in the LightningModule


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
    source = checkpoint_folder.find_checkpoint(checkpoint)
    checkpoint_folder.verify_checkpoint(source)
    state = open_state(source)
    chosen = None if dtype == "auto" else getattr(torch, dtype)
    published = source.folder / checkpoint_folder.WEIGHTS
    layout = {
        name.removeprefix(_MODULE): (chosen or state.dtype(name), state.shapes[name])
        for name in _trained(state)
    }
    file = TensorFile(published)
    known = {name: file.layout[name] for name in _only_published(state) if name in file.layout}
    layout |= {name: (chosen or of_file, shape) for name, (of_file, shape) in known.items()}
    with appearing_folder(output) as aside:
        weights = chain(_model_tensors(state), ((name, file.read(name)) for name in known))
        converted = ((name.removeprefix(_MODULE), value.to(chosen or value.dtype)) for name, value in weights)
        write_weights(aside / checkpoint_folder.WEIGHTS, layout, converted)
        try:
            compared = _compare(state, chosen, aside / checkpoint_folder.WEIGHTS, published)
        except SafetensorError as error:
            raise UserError(f"{published} cannot be read ({error}): use another checkpoint") from error
        for name in (checkpoint_folder.CONFIG, checkpoint_folder.TOKENIZER):
            shutil.copyfile(source.folder / name, aside / name)
        settings = source.folder / checkpoint_folder.TOKENIZER_SETTINGS
        if settings.is_file():
            shutil.copyfile(settings, aside / settings.name)
        for name, content in source.task_file().items():
            (aside / name).write_bytes(content)
        metadata = source.metadata | {"state_layout": None, "files": checkpoint_folder.describe_files(aside)}
        checkpoint_folder.write_metadata(aside, metadata)
    print(f"{output}: {compared} tensors, read back and equal to those of {source.folder}")
    return 0


def _trained(state: TrainingState) -> list[str]:
    """The model's part of what was trained: a distillation has projections besides, and adapters are none of
    the model's own weights."""
    return [name for name in state.shapes if name.startswith(_MODULE) and not is_adapter(name)]


def _only_published(state: TrainingState) -> list[str]:
    """Weights that no state holds, because they were frozen, or frozen beneath adapters."""
    frozen = state.trainer.get("frozen") or []
    return [own_name(str(name).removeprefix(_MODULE)) for name in frozen]


def _model_tensors(state: TrainingState) -> Iterator[tuple[str, Tensor]]:
    for name in _trained(state):
        yield name, state.read(name, WEIGHT)


def _compare(state: TrainingState, dtype: torch.dtype | None, written: Path, published: Path) -> int:
    """Read ``written`` back; compare it with the optimizer's weights, and those with ``published``."""
    others = _only_published(state)
    wanted = {name.removeprefix(_MODULE) for name in _trained(state)} | set(others)
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
    for short in others:
        with safe_open(written, "pt") as ours, safe_open(published, "pt") as theirs:
            model = theirs.get_tensor(short)
            if not torch.equal(_bits(ours.get_tensor(short)), _bits(model.to(dtype or model.dtype))):
                raise UserError(f"{written}: {short} is not the weight that {published} holds")
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
    source = checkpoint_folder.find_checkpoint(checkpoint)
    checkpoint_folder.verify_checkpoint(source)
    state = open_state(source)
    with appearing_folder(output) as aside:
        check_room(state, aside)
        write_universal(state, aside, Reporter())
    layout = StateLayout.read(source)
    print(f"{output}: universal checkpoint of {source.folder} (it held {layout})")
    return 0
