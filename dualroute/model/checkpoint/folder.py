"""The checkpoint folder: what lies in it, how it is found and checked.  Needs no torch.

    checkpoints/step-00000400/
        model.json           shape of the model
        model.safetensors    weights, whole whatever the number of ranks that trained them
        tokenizer.model      the sentencepiece model of the data
        tokenizer_config.json    its chat template and further ends of a text, where it has them
        state.ckpt           the trainer's own state: one file, or DeepSpeed's folder of partitions
        checkpoint.json      step, tokens, losses; size and sha256 of every other file.  Written last
    checkpoints/last, best   symbolic links

``tree_sha256`` in ``checkpoint.json`` is the sha256 of everything else that stands in it: with the hashes of
the files (:mod:`dualroute.model.checkpoint.tree_hash`) it is the root of a tree over the whole checkpoint.
Checkpoints of earlier versions have none.

:mod:`dualroute.training.checkpointing.publishing.publisher` writes it, everything else reads it, and
:mod:`dualroute.model.checkpoint.format` makes a model of it.  A folder named ``step-…`` is always whole.  It
is written under a hidden name, made durable, then published by one rename, so readers need no lock and a
crash leaves nothing to tidy by hand.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualroute.errors import UserError
from dualroute.files import read_json, read_limited
from dualroute.model.checkpoint import tree_hash

CONFIG, WEIGHTS, TOKENIZER, STATE, METADATA, TASK = (
    "model.json",
    "model.safetensors",
    "tokenizer.model",
    "state.ckpt",
    "checkpoint.json",
    "task.json",  # of a model that was trained for a task: columns, labels, kind
)
TOKENIZER_SETTINGS = "tokenizer_config.json"  #: its chat template and ends of a text, where it has them
LARGEST_TASK = 64 << 20  #: bytes of a task.json, most of which are names of labels
SEAL = "tree_sha256"  #: key in METADATA


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

    @property
    def to_minimise(self) -> float | None:
        """What the best checkpoint of a run has least of, if it was measured: a task's metric with the sign
        that makes less of it better, else the validation loss."""
        score = self.metadata.get("score")
        if score is None or self.val_loss is None:
            return self.val_loss
        return -float(score["value"]) if score["higher_is_better"] else float(score["value"])

    def task_file(self) -> dict[str, bytes]:
        """{name: content} of the file that says what the model was trained for; empty for a language model.

        What is made of a checkpoint (a smaller model, an export) hands it on.
        """
        path = self.folder / TASK
        return {TASK: read_limited(path, LARGEST_TASK)} if path.exists() else {}


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
    problem = _wrong_value(metadata) or _broken_seal(metadata)
    if problem:
        raise UserError(f"{folder / METADATA} is damaged ({problem}): use another checkpoint")
    return Checkpoint(folder, metadata["step"], metadata)


def _wrong_value(metadata: Any) -> str:
    """What is not as :func:`write_description` writes it, or ""."""
    if not isinstance(metadata, dict):
        return "it is not a table of keys and values"
    if not tree_hash.is_count(metadata.get("step")):
        return f"step is {metadata.get('step')!r}"
    if not tree_hash.is_count(metadata.get("tokens", 0)):
        return f"tokens is {metadata['tokens']!r}"
    for name in ("train_loss", "val_loss"):
        value = metadata.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"{name} is {value!r}"
    score = metadata.get("score")
    if score is not None and not _is_score(score):
        return f"score is {score!r}"
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
        if tree_hash.wrong_entry(said):
            return f"files says {str(said)[:200]} of {name}"
    return ""


def _is_score(score: Any) -> bool:
    return (
        isinstance(score, dict)
        and isinstance(score.get("name"), str)
        and isinstance(score.get("higher_is_better"), bool)
        and isinstance(score.get("value"), int | float)
        and not isinstance(score["value"], bool)
    )


def seal(metadata: Mapping[str, Any]) -> str:
    """The sha256 of all that ``metadata`` say, but for the seal itself, however it is laid out."""
    said = {key: value for key, value in metadata.items() if key != SEAL}
    # as it is read again: keys become text
    text = json.dumps(json.loads(json.dumps(said)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _broken_seal(metadata: Mapping[str, Any]) -> str:
    if SEAL not in metadata or metadata[SEAL] == seal(metadata):
        return ""
    return f"its values do not match its {SEAL}: they were changed, or part of them is lost"


def write_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write ``checkpoint.json``, sealed; the last file of a checkpoint."""
    sealed = {**metadata, SEAL: seal(metadata)}
    (folder / METADATA).write_text(json.dumps(sealed, indent=1), encoding="utf-8")


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


def describe_files(
    folder: Path, described: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """{relative path: entry} of every file below ``folder`` but the metadata itself.

    Args:
        folder: Of a checkpoint in the making.
        described: Entries that are known, because who wrote these files has hashed them.
    """
    known = described or {}
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {METADATA}
    # what another host has just written may not be listed here yet
    return {name: known.get(name) or tree_hash.describe(folder / name) for name in sorted(found | set(known))}


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
            elif digests and not tree_hash.is_whole(path, expected):
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
