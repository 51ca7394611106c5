"""What a teacher said of the samples of a run, on the disk: its likeliest tokens and the mass of the rest.

    identity.json        what was asked: data, seed, context, teacher, k, temperature, types.  Written first
    logits-00000.tar     a WebDataset tar of ``shard_samples`` samples in the order of the run's plan, each
                         NUMBER.log_probs.npy (context, k), NUMBER.ids.npy (context, k), NUMBER.rest.npy
    logits-00000.json    its size and sha256; written when the tar is whole
    manifest.json        identity, number of samples and all shards; written last

In: :class:`~dualroute.distillation.losses.TopK` of one sample after the other, from
:mod:`~dualroute.distillation.cache_logits`.  Here: shards are written, and found when a run goes on.
Next: :mod:`~dualroute.distillation.logit_reader`.

There is no index.  The order of a run is a function of (data, seed, context), so the
number of a sample says where it lies: all members of a cache have the same size, and so have all samples.
"""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dualroute.data.manifest import canonical_json, token_dtype
from dualroute.distillation.losses import TopK
from dualroute.errors import UserError
from dualroute.files import atomic_path, file_sha256, write_bytes_atomically

FORMAT, VERSION = "dualroute-logits", 1
IDENTITY, MANIFEST = "identity.json", "manifest.json"
MEMBERS = ("log_probs", "ids", "rest")
REMEDY = "run the same `dualroute cache-logits` again"


@dataclass(frozen=True)
class Identity:
    """What a cache says of what; caches of one identity differ in length only.

    Attributes:
        fingerprint: Of the data's manifest.
        seed: Of the order of the data.
        context: Tokens of a sample.
        vocab_size: Of the teacher.
        tokenizer: sha256 of its file.
        teacher: sha256 of its weights.
        top_k: Tokens kept.
        temperature: Of the distribution that was cut down.
        dtype: Of the stored logarithms: float16, bfloat16 or float32.
        shard_samples: Samples of a full shard.
    """

    fingerprint: str
    seed: int
    context: int
    vocab_size: int
    tokenizer: str
    teacher: str
    top_k: int
    temperature: float
    dtype: str
    shard_samples: int

    @property
    def bytes_per_token(self) -> int:
        """On the disk, without the tar's headers."""
        of_numbers = 4 if self.dtype == "float32" else 2
        return self.top_k * (of_numbers + np.dtype(token_dtype(self.vocab_size)).itemsize) + of_numbers

    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and stored type of each member; bfloat16 is stored as the uint16 of its bits."""
        numbers = np.dtype({"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}[self.dtype])
        ids = np.dtype(token_dtype(self.vocab_size)).newbyteorder("<")
        wide = (self.context, self.top_k)
        return {"log_probs": (wide, numbers), "ids": (wide, ids), "rest": ((self.context,), numbers)}

    def differences(self, other: Identity) -> list[str]:
        """ "name ours → theirs" for each field that differs."""
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [f"{name} {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]]


def shard_name(number: int) -> str:
    """Name of a shard's tar."""
    return f"logits-{number:05d}.tar"


def claim(folder: Path, identity: Identity) -> None:
    """Make ``folder`` the place of this cache, or go on in it.

    Raises:
        UserError: It holds another cache, or cannot be written.
    """
    path = folder / IDENTITY
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_bytes_atomically(path, canonical_json(dataclasses.asdict(identity)))
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written ({error}): choose another folder") from error
    differing = _read_identity(path).differences(identity)
    if differing:
        raise UserError(f"{folder} holds another cache ({'; '.join(differing)}): choose another --output")


def _read_identity(path: Path) -> Identity:
    return identity_of(read_json(path), path)


def identity_of(values: Any, path: Path) -> Identity:
    try:
        return Identity(**values)
    except TypeError as error:
        raise UserError(f"{path} is damaged or of another version ({error}); {REMEDY}") from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent} is not a finished cache of logits: no {path.name}; {REMEDY}"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {REMEDY}") from error


# ------------------------------------------------------------------ writing


class ShardWriter:
    """Writes one shard, sample after sample; it has its name when all are in it."""

    def __init__(self, folder: Path, identity: Identity, number: int) -> None:
        self.path, self.identity, self.number = folder / shard_name(number), identity, number
        self.samples = 0

    @property
    def note(self) -> Path:
        """The file that says the shard is whole."""
        return self.path.with_suffix(".json")

    def is_whole(self, samples: int) -> bool:
        """Whether the shard is there already, with as many samples."""
        try:
            note = json.loads(self.note.read_bytes())
            return bool(note["samples"] == samples and self.path.stat().st_size == note["size"])
        except (OSError, ValueError, KeyError):
            return False

    def write(self, samples: Iterator[TopK]) -> None:
        """Write ``samples`` (each (context, k), (context, k), (context,)) and the note."""
        for leftover in self.path.parent.glob(f".{self.path.name}.partial-*"):
            leftover.unlink(missing_ok=True)
        first, count = self.number * self.identity.shard_samples, 0
        with atomic_path(self.path) as aside:
            with tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
                for sample in samples:
                    for name, array in _encoded(sample, self.identity).items():
                        content = io.BytesIO()
                        np.save(content, array)
                        member = tarfile.TarInfo(f"{first + count:010d}.{name}.npy")
                        member.size = content.tell()
                        content.seek(0)
                        tar.addfile(member, content)
                    count += 1
            digest, size = file_sha256(aside), aside.stat().st_size
        note = {"file": self.path.name, "samples": count, "size": size, "sha256": digest}
        write_bytes_atomically(self.note, canonical_json(note))


def _encoded(sample: TopK, identity: Identity) -> dict[str, NDArray[Any]]:
    arrays = {}
    for name, tensor in zip(MEMBERS, sample, strict=True):
        shape, dtype = identity.shapes()[name]
        if name == "ids":
            array = tensor.cpu().numpy().astype(dtype)
        elif identity.dtype == "bfloat16":
            array = tensor.cpu().to(torch.bfloat16).view(torch.int16).numpy().view(dtype)
        else:
            array = tensor.cpu().numpy().astype(dtype)
        if array.shape != shape:
            raise ValueError(f"{name} {array.shape} of a sample; the cache holds {shape}")
        arrays[name] = array
    return arrays


def finish(folder: Path, identity: Identity, samples: int) -> bool:
    """Write the manifest if all shards are there; the rank that is last finds it so.

    Returns:
        Whether the cache is finished.
    """
    shards = []
    for number in range(-(-samples // identity.shard_samples)):
        writer = ShardWriter(folder, identity, number)
        if not writer.is_whole(min(identity.shard_samples, samples - number * identity.shard_samples)):
            return False
        shards.append(json.loads(writer.note.read_bytes()))
    content = {
        "format": FORMAT,
        "version": VERSION,
        "identity": dataclasses.asdict(identity),
        "samples": samples,
        "bytes_per_token": identity.bytes_per_token,
        "shards": shards,
    }
    write_bytes_atomically(folder / MANIFEST, json.dumps(content, indent=1).encode())
    return True
