"""The checkpoint folder: what lies in it, how it is found, checked and turned into a model again.

    checkpoints/step-00000400/
        model.json           shape of the model
        model.safetensors    weights, whole whatever the number of ranks that trained them
        tokenizer.model      the sentencepiece model of the data
        state.ckpt           the trainer's own state: one file, or DeepSpeed's folder of partitions
        checkpoint.json      step, tokens, losses; size and sha256 of every other file.  Written last
    checkpoints/last, best   symbolic links

:mod:`dualroute.training.checkpointing.publisher` writes it, everything else reads it.  A folder
named ``step-…`` is always whole.  It is written under a hidden name, made durable, then published by one
rename, so readers need no lock and a crash leaves nothing to tidy by hand.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualroute.errors import UserError
from dualroute.files import appearing_folder, file_sha256, read_json
from dualroute.model.config import ModelConfig
from dualroute.model.quantized import assemble
from dualroute.model.transformer import DualRoutingTransformer
from dualroute.model.weights_file import TensorFile, write_tensors

CONFIG, WEIGHTS, TOKENIZER, STATE, METADATA = (
    "model.json",
    "model.safetensors",
    "tokenizer.model",
    "state.ckpt",
    "checkpoint.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """One finished checkpoint: its folder and what ``checkpoint.json`` says of it."""

    folder: Path
    step: int
    metadata: dict[str, Any] = field(repr=False)

    @property
    def state(self) -> Path:
        """The trainer's state, for Lightning's ``ckpt_path``."""
        return self.folder / STATE

    @property
    def val_loss(self) -> float | None:
        """Validation loss at this step, if it was measured."""
        return self.metadata.get("val_loss")


def step_folder(step: int) -> str:
    """Folder name of a step; sorts by step."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step that the name of a ``step-…`` folder says, or None for another name."""
    match = re.fullmatch(r"step-(\d{1,18})", folder.name)
    return int(match[1]) if match else None


class NotFinishedError(UserError):
    """A folder without ``checkpoint.json``: no checkpoint, or one that was copied in part."""


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read ``checkpoint.json`` of one checkpoint folder.

    Raises:
        NotFinishedError: The folder has none.
        UserError: It is damaged, or its values are of other types than ours.
    """
    folder = Path(folder)
    try:
        metadata = read_json(folder / METADATA)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFinishedError(f"{folder} is not a finished checkpoint: it has no {METADATA}") from error
    except UserError as error:
        raise UserError(f"{str(error).removesuffix(': restore it')}: use another checkpoint") from error
    problem = _wrong_value(metadata)
    if problem:
        raise UserError(f"{folder / METADATA} is damaged ({problem}): use another checkpoint")
    return Checkpoint(folder, metadata["step"], metadata)


def _wrong_value(metadata: Any) -> str:
    """What is not as :func:`write_description` writes it, or ""."""
    if not isinstance(metadata, dict):
        return "it is not a table of keys and values"
    if not _is_count(metadata.get("step")):
        return f"step is {metadata.get('step')!r}"
    if not _is_count(metadata.get("tokens", 0)):
        return f"tokens is {metadata['tokens']!r}"
    for name in ("train_loss", "val_loss"):
        value = metadata.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"{name} is {value!r}"
    if not isinstance(metadata.get("state_layout"), str | None):
        return f"state_layout is {metadata['state_layout']!r}"
    if not isinstance(metadata.get("quantization"), dict | None):
        return f"quantization is {metadata['quantization']!r}"
    files = metadata.get("files", {})
    if not isinstance(files, dict):
        return "files is not a table"
    for name, said in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"files names {name}, which lies outside of the checkpoint"
        if not (
            isinstance(said, dict) and _is_count(said.get("size")) and isinstance(said.get("sha256"), str)
        ):
            return f"files says {said!r} of {name}"
    return ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True)
class Scan:
    """The ``step-…`` folders of a ``checkpoints`` folder.

    Attributes:
        finished: Those that are whole, oldest first.
        unfinished: Those without ``checkpoint.json``, by name.
        damaged: Those whose ``checkpoint.json`` cannot be used, by name, each with the reason.
    """

    finished: list[Checkpoint]
    unfinished: list[Path]
    damaged: dict[Path, UserError]


def scan_checkpoints(folder: str | Path) -> Scan:
    """Look at every ``step-…`` folder in ``folder``; one that is not there holds none.

    Raises:
        UserError: The folder cannot be listed.
    """
    scan = Scan([], [], {})
    try:
        names = sorted(name for name in os.listdir(folder) if name.startswith("step-"))
    except (FileNotFoundError, NotADirectoryError):
        return scan
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror or error}): mount it, or give access to it"
        ) from error
    for path in (Path(folder, name) for name in names):
        try:
            scan.finished.append(read_checkpoint(path))
        except NotFinishedError:
            scan.unfinished.append(path)
        except UserError as error:
            scan.damaged[path] = error
    scan.finished.sort(key=lambda checkpoint: checkpoint.step)
    return scan


def list_checkpoints(folder: str | Path) -> list[Checkpoint]:
    """Finished checkpoints in a ``checkpoints`` folder, oldest first; unfinished ones are not seen.

    Raises:
        UserError: The folder cannot be listed, or a ``checkpoint.json`` in it is damaged.
    """
    scan = scan_checkpoints(folder)
    for error in scan.damaged.values():
        raise error
    return scan.finished


def find_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint that a person means by ``path``: a checkpoint folder, a ``checkpoints`` folder or a
    run folder (the newest finished one of it).

    Raises:
        UserError: Nothing finished is found there.
    """
    path = Path(path)
    if os.path.isfile(path / METADATA):
        return read_checkpoint(path)
    for folder in (path, path / "checkpoints"):
        found = list_checkpoints(folder)
        if found:
            return found[-1]
    if not os.path.exists(path):
        raise UserError(f"there is no checkpoint at {path}: no such folder")
    raise UserError(f"there is no finished checkpoint in {path}: give a run folder or a step-… folder")


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """{relative path: {"size", "sha256"}} of every file below ``folder`` but the metadata itself."""
    return {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != METADATA
    }


def damages(checkpoint: Checkpoint, *, digests: bool = True, only: str | None = None) -> Iterator[str]:
    """What is wrong with the files of a checkpoint, compared with its metadata: one line for each file.

    Args:
        checkpoint: The checkpoint to look at.
        digests: Also compare sha256 (reads every byte), not only sizes.
        only: Look at this one file.
    """
    described = checkpoint.metadata.get("files", {})
    for name in _expected_files(checkpoint):
        if name not in described and only in (None, name):
            yield f"{checkpoint.folder / METADATA} says nothing of {name}: whether it is whole cannot be told"
    for name, expected in described.items():
        if only is not None and name != only:
            continue
        path = checkpoint.folder / name
        try:
            if path.is_dir():
                yield f"{path} is a folder, and {METADATA} says a file of {expected['size']:,} bytes"
            elif not path.is_file():
                yield f"{path} is missing from the checkpoint"
            elif (size := path.stat().st_size) != expected["size"]:
                yield f"{path} has {size:,} bytes, {METADATA} says {expected['size']:,} (truncated)"
            elif digests and file_sha256(path) != expected["sha256"]:
                yield f"{path} does not match the sha256 in {METADATA} (changed or corrupted)"
        except OSError as error:
            yield f"{path} cannot be read ({error.strerror or error})"


def _expected_files(checkpoint: Checkpoint) -> Iterator[str]:
    """What every checkpoint has; a training's state is one file, or some below a folder of that name."""
    yield from (CONFIG, WEIGHTS, TOKENIZER)
    described = checkpoint.metadata.get("files", {})
    if checkpoint.metadata.get("state_layout") and not any(n.startswith(f"{STATE}/") for n in described):
        yield STATE


def verify_checkpoint(checkpoint: Checkpoint, *, digests: bool = True, only: str | None = None) -> None:
    """Refuse a checkpoint with damaged files; for the arguments see :func:`damages`.

    Raises:
        UserError: A file is missing, truncated or changed; the message names it.
    """
    damage = next(damages(checkpoint, digests=digests, only=only), None)
    if damage is not None:
        raise UserError(f"{damage}; use an earlier checkpoint (see the step-… folders beside it)")


def refuse_quantized(checkpoint: Checkpoint, consequence: str) -> None:
    """Refuse a checkpoint whose weights are quantised where floats are needed.

    Raises:
        UserError: Naming the checkpoint, its scheme and what follows from it.
    """
    said = checkpoint.metadata.get("quantization")
    if said is not None:
        raise UserError(f"{checkpoint.folder} is quantized ({said.get('scheme')}): {consequence}")


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
        for name, content in (extra or {}).items():
            (aside / name).write_bytes(content)
        write_description(aside, model.config, tokenizer, metadata)
    return read_checkpoint(output)


def write_description(
    folder: Path, config: ModelConfig, tokenizer: str | Path, metadata: dict[str, Any]
) -> None:
    """Add to ``folder`` all that makes weights a checkpoint, its metadata last."""
    (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=1), encoding="utf-8")
    shutil.copyfile(tokenizer, folder / TOKENIZER)
    standard = {"format": "dualroute-checkpoint", "version": 1, "step": 0, "tokens": 0}
    described = {**standard, **metadata, "files": describe_files(folder)}
    (folder / METADATA).write_text(json.dumps(described, indent=1), encoding="utf-8")


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
    check_weights(model, {name: shape for name, (_, shape) in file.layout.items()}, str(file.path))
    dtypes = {dtype for dtype, _ in file.layout.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    for name, value in file.tensors():
        replace_parameter(model, name, nn.Parameter(value.to(dtype)))
    return model.eval()


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


def check_weights(model: DualRoutingTransformer, weights: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Compare names and shapes of ``weights`` with the model's parameters.

    Raises:
        UserError: The first parameter that differs, with both shapes.
    """
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in sorted(own.keys() | weights.keys()):
        theirs = tuple(weights[name]) if name in weights else None
        if own.get(name) != theirs:
            raise UserError(
                f"{source} holds a model of another shape: {name} is {theirs or 'absent'} there and "
                f"{own.get(name) or 'absent'} in the configured model; use the model settings it was "
                f"trained with, or another output folder"
            )
