"""The manifest of a dataset folder: which shards there are, what they hold, and how to be sure of it.

`data_prep` writes a folder; everything downstream reads it through this module::

    manifest.json            this module; written last, so a folder with a manifest is complete
    tokenizer.model          sentencepiece, or a Hugging Face tokenizer.json under this name
    train-00000.tar ...      WebDataset tars of whole documents: KEY.npy (1-D token ids, <bos> in front, <eos>
    val-00000.tar ...        behind) and KEY.json (source, bytes, sha256 of the text)
    train.index.npy          int64 (documents, 4): shard number, byte offset of the first id inside the tar,
    val.index.npy            number of tokens, UTF-8 bytes of the text

Next comes `plan`, which needs only the index and the fingerprint to say which tokens make a batch, and
`reader`, which maps the tars into memory.

Nobody parses a tar while training.  The index points at the ids *inside* the tar, so a
window of tokens is one slice of a memory map; the tars stay readable by any WebDataset loader all the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dualroute.errors import UserError
from dualroute.files import file_sha256, write_bytes_atomically

FORMAT = "dualroute-shards"
VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.model"
#: Columns of ``{split}.index.npy``.
INDEX_COLUMNS = ("shard", "offset", "tokens", "bytes")
_DTYPES = ("uint16", "uint32")
_REMEDY = "run `dualroute prepare` again"


def token_dtype(vocab_size: int) -> str:
    """Smallest numpy type that holds every id: ``uint16`` up to a vocabulary of 65,536, else ``uint32``."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def canonical_json(value: Any) -> bytes:
    """JSON that is equal for equal values: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the ids; ``pad_id`` is an id to fill with (<eos> in a model without <pad>)."""

    file: str
    sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int


@dataclass(frozen=True)
class Shard:
    """One tar. ``bytes`` counts the UTF-8 bytes of the text, ``size`` those of the file."""

    file: str
    documents: int
    tokens: int
    bytes: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """Train or validation: the totals over its shards, and its index file."""

    name: str
    documents: int
    tokens: int
    bytes: int
    index_file: str
    index_sha256: str
    shards: tuple[Shard, ...]

    @property
    def targets(self) -> int:
        """Next-token targets: every token but the first of its document is predicted once."""
        return self.tokens - self.documents

    @property
    def targets_per_byte(self) -> float:
        """Turns nats per target into nats per byte of text, which compares models across tokenizers."""
        return self.targets / self.bytes

    def to_json(self) -> dict[str, Any]:
        """The split as it stands in manifest.json."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "index": {"file": self.index_file, "sha256": self.index_sha256},
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
        }


@dataclass(frozen=True)
class Manifest:
    """A complete dataset folder.

    Attributes:
        folder: where it lies; not part of the fingerprint, so a folder may be moved or copied.
        dtype: of the stored ids, ``uint16`` or ``uint32``.
        tokenizer, splits: what is in it.
        preparation: options and counts of the run that made it, for people; not part of the fingerprint.
    """

    folder: Path
    dtype: str
    tokenizer: TokenizerInfo
    splits: Mapping[str, Split]
    preparation: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's hash and the splits: equal exactly when the token stream is."""
        splits = {name: split.to_json() for name, split in self.splits.items()}
        content = {"tokenizer": self.tokenizer.sha256, "splits": splits}
        return hashlib.sha256(canonical_json(content)).hexdigest()

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / self.tokenizer.file

    def split(self, name: str) -> Split:
        """The split called ``name``.

        Raises:
            UserError: there is none; the message names those there are.
        """
        if name not in self.splits:
            known = ", ".join(sorted(self.splits)) or "none"
            raise UserError(f"{self.folder}: no split {name!r}; it has {known}")
        return self.splits[name]

    def shard_paths(self, split: str) -> list[Path]:
        """Paths of a split's tars, in the order of the index's shard numbers."""
        return [self.folder / shard.file for shard in self.split(split).shards]

    def open_index(self, split: str) -> np.ndarray:
        """Memory map of the index of ``split``: int64 (documents, 4), columns `INDEX_COLUMNS`, stream order.

        Raises:
            UserError: the file is missing, damaged, or does not fit the manifest.
        """
        info = self.split(split)
        path = self.folder / info.index_file
        try:
            index = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: the index cannot be read ({error}); {_REMEDY}") from error
        shape = (info.documents, len(INDEX_COLUMNS))
        if index.dtype != np.int64 or index.shape != shape:
            raise UserError(
                f"{path}: {index.dtype} {index.shape}, the manifest says int64 {shape}; {_REMEDY}"
            )
        return index

    def to_json(self) -> dict[str, Any]:
        """The manifest as it stands in manifest.json."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.dtype,
            "tokenizer": dataclasses.asdict(self.tokenizer),
            "splits": {name: split.to_json() for name, split in self.splits.items()},
            "preparation": dict(self.preparation),
            "fingerprint": self.fingerprint,
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``folder/manifest.json`` by rename."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        write_bytes_atomically(Path(folder) / MANIFEST_FILE, text.encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read ``folder/manifest.json`` (a path to the file itself will do).

        Raises:
            UserError: missing, not JSON, another format or version, a key missing or of a wrong type, or a
                fingerprint that does not match the contents (a manifest edited by hand).
        """
        path = Path(folder)
        if path.name != MANIFEST_FILE:
            path = path / MANIFEST_FILE
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise UserError(
                f"{path}: no such file, so not a finished dataset; make one with `dualroute prepare`"
            ) from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); {_REMEDY}") from error
        return _Reader(path).manifest(content)


class _Reader:
    """Turns parsed JSON into a Manifest, naming the file and the key wherever the two do not fit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, mapping: Any, key: str, kind: type, where: str = "") -> Any:
        name = f"{where}.{key}" if where else key
        if not isinstance(mapping, dict) or key not in mapping:
            raise UserError(f"{self.path}: key {name!r} is missing; {_REMEDY}")
        value = mapping[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{self.path}: key {name!r} must be {kind.__name__}, not {value!r}; {_REMEDY}")
        return value

    def count(self, mapping: Any, key: str, where: str) -> int:
        value: int = self.get(mapping, key, int, where)
        if value <= 0:
            raise UserError(f"{self.path}: key '{where}.{key}' must be positive, not {value}; {_REMEDY}")
        return value

    def file(self, mapping: Any, key: str, where: str) -> str:
        value: str = self.get(mapping, key, str, where)
        if not value or value in {".", ".."} or "/" in value or "\\" in value:
            raise UserError(f"{self.path}: key '{where}.{key}' must be a plain file name, not {value!r}")
        return value

    def manifest(self, content: Any) -> Manifest:
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{self.path}: not a {FORMAT} manifest; make a dataset with `dualroute prepare`")
        if content.get("version") != VERSION:
            found = content.get("version")
            raise UserError(
                f"{self.path}: version {found!r}, this program reads version {VERSION}; {_REMEDY}"
            )
        dtype = self.get(content, "dtype", str)
        if dtype not in _DTYPES:
            raise UserError(f"{self.path}: key 'dtype' must be one of {', '.join(_DTYPES)}, not {dtype!r}")
        splits = self.get(content, "splits", dict)
        manifest = Manifest(
            folder=self.path.parent,
            dtype=dtype,
            tokenizer=self.tokenizer(self.get(content, "tokenizer", dict)),
            splits={name: self.split(name, self.get(splits, name, dict, "splits")) for name in splits},
            preparation=self.get(content, "preparation", dict),
        )
        if self.get(content, "fingerprint", str) != manifest.fingerprint:
            raise UserError(f"{self.path}: the fingerprint does not match the contents (edited?); {_REMEDY}")
        return manifest

    def tokenizer(self, info: dict[str, Any]) -> TokenizerInfo:
        ids = {key: self.get(info, key, int, "tokenizer") for key in ("bos_id", "eos_id", "pad_id")}
        return TokenizerInfo(
            file=self.file(info, "file", "tokenizer"),
            sha256=self.get(info, "sha256", str, "tokenizer"),
            vocab_size=self.count(info, "vocab_size", "tokenizer"),
            **ids,
        )

    def split(self, name: str, info: dict[str, Any]) -> Split:
        where = f"splits.{name}"
        index = self.get(info, "index", dict, where)
        shards = [
            self.shard(shard, f"{where}.shards[{number}]")
            for number, shard in enumerate(self.get(info, "shards", list, where))
        ]
        split = Split(
            name=name,
            **{key: self.count(info, key, where) for key in ("documents", "tokens", "bytes")},
            index_file=self.file(index, "file", f"{where}.index"),
            index_sha256=self.get(index, "sha256", str, f"{where}.index"),
            shards=tuple(shards),
        )
        for key in ("documents", "tokens", "bytes"):
            total = sum(getattr(shard, key) for shard in shards)
            if total != getattr(split, key):
                stated = getattr(split, key)
                raise UserError(
                    f"{self.path}: '{where}.{key}' is {stated}, its shards add up to {total}; {_REMEDY}"
                )
        return split

    def shard(self, info: Any, where: str) -> Shard:
        return Shard(
            file=self.file(info, "file", where),
            **{key: self.count(info, key, where) for key in ("documents", "tokens", "bytes", "size")},
            sha256=self.get(info, "sha256", str, where),
        )


def verify_shards(manifest: Manifest, split: str, level: Literal["size", "sha256"] = "size") -> None:
    """Check the files of ``split`` against the manifest: sizes (instant), or contents too (reads everything).

    Raises:
        UserError: names the first file that is missing, has another size or (``sha256``) other contents.
        ValueError: an unknown level.
    """
    if level not in ("size", "sha256"):
        raise ValueError(f"level must be 'size' or 'sha256', not {level!r}")
    info = manifest.split(split)
    manifest.open_index(split)  # checks its shape, hence its size
    expected: list[tuple[str, int | None, str]] = [
        *((shard.file, shard.size, shard.sha256) for shard in info.shards),
        (info.index_file, None, info.index_sha256),
        (manifest.tokenizer.file, None, manifest.tokenizer.sha256),
    ]
    remedy = f"copy it again, or {_REMEDY}"
    for file, size, sha256 in expected:
        path = manifest.folder / file
        try:
            found = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
        if size is not None and found != size:
            raise UserError(f"{path}: {found} bytes, the manifest says {size}; {remedy}")
        if level == "sha256" and file_sha256(path) != sha256:
            raise UserError(f"{path}: contents differ from the manifest (sha256); {remedy}")
