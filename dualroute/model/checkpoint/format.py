"""A checkpoint as a model: its weights written, read, and compared with a configuration.

In: a checkpoint folder (:mod:`dualroute.model.checkpoint.folder`, whose names are found here too).  Here:
what needs torch.  Next: evaluation, compression, serving and a run's ``init_from`` take the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualroute.errors import UserError
from dualroute.files import appearing_folder
from dualroute.model.checkpoint.folder import (
    CONFIG,
    METADATA,
    STATE,
    TASK,
    TOKENIZER,
    TOKENIZER_SETTINGS,
    WEIGHTS,
    Checkpoint,
    damages,
    describe_files,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    refuse_quantized,
    scan_checkpoints,
    step_folder,
    verify_checkpoint,
    write_metadata,
)
from dualroute.model.checkpoint.weights_file import TensorFile, write_tensors
from dualroute.model.config import ModelConfig
from dualroute.model.quantized import assemble
from dualroute.model.task_heads import TaskHead
from dualroute.model.transformer import INIT_STD, DualRoutingTransformer

__all__ = [
    "CONFIG",
    "METADATA",
    "STATE",
    "TASK",
    "TOKENIZER",
    "TOKENIZER_SETTINGS",
    "WEIGHTS",
    "Checkpoint",
    "check_weights",
    "damages",
    "describe_files",
    "find_checkpoint",
    "list_checkpoints",
    "load_model",
    "read_checkpoint",
    "refuse_quantized",
    "save_model",
    "scan_checkpoints",
    "step_folder",
    "verify_checkpoint",
    "write_description",
]


def save_model(
    model: DualRoutingTransformer,
    output: str | Path,
    tokenizer: str | Path,
    metadata: dict[str, Any],
    extra: Mapping[str, bytes] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """Write a checkpoint of weights alone: what conversion, pruning and quantisation leave behind.

    Everything that reads a checkpoint takes it; only a training cannot be resumed from it (it can begin with
    its weights, ``init_from``).

    Args:
        model: Written parameter by parameter, tied ones once, in their dtype.
        output: Folder to make; it appears whole or not at all.
        tokenizer: The tokenizer file that the ids come from.
        metadata: What else ``checkpoint.json`` should say; ``step`` and ``tokens`` are 0 unless given.
        extra: Other files to put beside the weights, by name.
        tensors: What to write instead of the parameters, where weights are not floats.

    Raises:
        UserError: ``output`` exists already, or cannot be written.
    """
    if tensors is None:
        tensors = dict(model.named_parameters())
    with appearing_folder(output) as aside:
        write_tensors(aside / WEIGHTS, tensors)
        write_description(aside, model.config, tokenizer, metadata, extra=extra)
    return read_checkpoint(output)


def write_description(
    folder: Path,
    config: ModelConfig,
    tokenizer: str | Path,
    metadata: dict[str, Any],
    described: Mapping[str, dict[str, Any]] | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> None:
    """Add to ``folder`` all that makes weights a checkpoint, its metadata last.

    ``described`` are the entries of files that were hashed while they were written; ``extra`` other files to
    put there, by name.
    """
    for name, content in (extra or {}).items():
        (folder / name).write_bytes(content)
    (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=1), encoding="utf-8")
    shutil.copyfile(tokenizer, folder / TOKENIZER)
    beside = Path(tokenizer).with_name(TOKENIZER_SETTINGS)
    if beside.is_file() and TOKENIZER_SETTINGS not in (extra or {}):
        shutil.copyfile(beside, folder / TOKENIZER_SETTINGS)
    standard = {"format": "dualroute-checkpoint", "version": 1, "step": 0, "tokens": 0}
    write_metadata(folder, {**standard, **metadata, "files": describe_files(folder, described)})


def load_model(checkpoint: Checkpoint, config: ModelConfig | None = None) -> DualRoutingTransformer:
    """The model of a checkpoint, on the CPU, in the dtype it was saved in, in evaluation mode.

    A quantised checkpoint gives a quantised model (see :mod:`dualroute.model.quantized`).

    Args:
        checkpoint: Whose weights.
        config: The model to build; null means the checkpoint's.  May differ in what has no weights (window,
            routing, context).

    Raises:
        UserError: The weights are missing, damaged or of another shape than ``model.json``.
    """
    verify_checkpoint(checkpoint, only=CONFIG)
    file = open_weights(checkpoint)
    config = config or ModelConfig.from_file(checkpoint.folder / CONFIG)
    if "quantization" in checkpoint.metadata:
        return assemble(config, dict(file.tensors()), checkpoint.metadata["quantization"], str(file.path))
    with torch.device("meta"):
        model = DualRoutingTransformer(config)
    check_weights(model, file.shapes, str(file.path))
    dtypes = {dtype for dtype, _ in file.layout.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    for name, value in file.tensors():
        replace_parameter(model, name, nn.Parameter(value.to(dtype)))
    return model.eval()


def load_body(checkpoint: Checkpoint, config: ModelConfig, seed: int) -> DualRoutingTransformer:
    """:func:`load_model` for a model that may have another head than the checkpoint's.

    A head that the checkpoint does not have, or has for other labels, is drawn anew with ``seed``; one that
    the model does not have is left.

    Raises:
        UserError: As :func:`load_model` does; or the checkpoint is quantised.
    """
    refuse_quantized(checkpoint, "integers cannot be trained; give the checkpoint it was made from")
    verify_checkpoint(checkpoint, only=CONFIG)
    file = open_weights(checkpoint)
    with torch.device("meta"):
        model = DualRoutingTransformer(config)
    new = new_head(checkpoint, config, seed)
    keeps = keeps_head(checkpoint, config)
    taken = {name: shape for name, shape in file.shapes.items() if keeps or not is_head(name)}
    drawn = {name: tuple(value.shape) for name, value in new.items()}
    check_weights(model, {**taken, **drawn}, str(file.path))
    for name in taken:
        replace_parameter(model, name, nn.Parameter(file.read(name).float()))
    for name, value in new.items():
        replace_parameter(model, name, nn.Parameter(value))
    return model


def is_head(name: str) -> bool:
    """Whether a parameter of this name belongs to what leaves the model."""
    return name.startswith(("task_head.", "head."))


def keeps_head(checkpoint: Checkpoint, config: ModelConfig) -> bool:
    """Whether ``checkpoint`` has the head of ``config``: the next token's, or one of the same labels."""
    theirs = ModelConfig.from_file(checkpoint.folder / CONFIG)
    return theirs.task_head == config.task_head


def new_head(checkpoint: Checkpoint, config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """{name: float32 tensor} of the head that a model which begins with ``checkpoint`` has to draw.

    One that was the embedding, and is to be a head of its own, begins with the embedding's weight.
    """
    tied = ModelConfig.from_file(checkpoint.folder / CONFIG).tie_embeddings
    if tied and not config.head_is_tied:
        return {"head.weight": open_weights(checkpoint).read("embedding.weight").float()}
    if keeps_head(checkpoint, config):
        return {}
    torch.manual_seed(seed)
    if config.task_head is not None:
        head = TaskHead(config.task_head, config.dim)
        head.init_weights(INIT_STD)
        return {f"task_head.{name}": parameter.detach() for name, parameter in head.named_parameters()}
    if config.tie_embeddings:
        return {}
    assert config.vocab_size is not None
    return {"head.weight": torch.empty(config.vocab_size, config.dim).normal_(std=INIT_STD)}


def open_weights(checkpoint: Checkpoint, *, verified: bool = True) -> TensorFile:
    """The weights of a checkpoint, to be read one by one.

    Args:
        checkpoint: Whose weights.
        verified: Compare the file with its sha256 first, not only with its size.

    Raises:
        UserError: The file is missing or damaged.
    """
    verify_checkpoint(checkpoint, only=WEIGHTS, digests=verified)
    return TensorFile(checkpoint.folder / WEIGHTS)


def replace_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put ``parameter`` where that of this name is, and everywhere else where it is shared (tied weights)."""
    old = model.get_parameter(name)
    for module in model.modules():
        for leaf, own in module._parameters.items():
            if own is old:
                module._parameters[leaf] = parameter


def check_weights(
    model: DualRoutingTransformer | Mapping[str, tuple[int, ...]],
    weights: Mapping[str, tuple[int, ...]],
    source: str,
) -> None:
    """Compare names and shapes of ``weights`` with those of the model's parameters.

    Raises:
        UserError: The first parameter that differs, with both shapes.
    """
    if isinstance(model, nn.Module):
        own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    else:
        own = dict(model)
    for name in sorted(own.keys() | weights.keys()):
        theirs = tuple(weights[name]) if name in weights else None
        if own.get(name) != theirs:
            raise UserError(
                f"{source} holds a model of another shape: {name} is {theirs or 'absent'} there and "
                f"{own.get(name) or 'absent'} in the configured model; use the model settings it was "
                f"trained with, or another output folder"
            )
