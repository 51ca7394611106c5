"""The manifest of a dataset folder: which shards there are, what they hold, and how to be sure of it.

`data_prep` writes a folder; everything downstream reads it through this module::

    manifest.json            this module; written last, so a folder with a manifest is complete
    tokenizer.model          sentencepiece, or a Hugging Face tokenizer.json under this name
    train-00000.tar ...      WebDataset tars of whole documents: KEY.npy (1-D token ids, <bos> in front, <eos>
    val-00000.tar ...        behind) and KEY.json (source, bytes, sha256 of the text)
    train.index.npy          where each document lies inside the tars: see `index`
    val.index.npy

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
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dualroute.data.index import ROW_BYTES, IndexRows, check_rows, map_index, release_pages
from dualroute.errors import UserError, other_remedy
from dualroute.files import file_sha256, read_limited, require_regular, write_bytes_atomically

FORMAT = "dualroute-shards"
VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.model"
#: Of manifest.json: 200 bytes a shard, so some 300,000 shards.
MAX_MANIFEST_BYTES = 64 << 20
_MAX_COUNT = 1 << 53  # of anything that is counted; exact in a float too
_RELEASED_DOCUMENTS = 1 << 20  # 32 MiB of an index
_DTYPES = {"uint16": 1 << 16, "uint32": 1 << 32}  # and how many ids they tell apart
_REMEDY = "run `dualroute prepare` again"
_REMEDY_FOR_FILES = f"copy it again, or {_REMEDY}"


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

    def open_index(self, split: str) -> NDArray[np.int64]:
        """Memory map of the index of ``split``: int64 (documents, 4), columns `INDEX_COLUMNS`, in order.

        Raises:
            UserError: the file is missing, damaged, or does not fit the manifest.
        """
        info = self.split(split)
        return map_index(self.folder / info.index_file, info.documents, _REMEDY)

    def index_rows(self, split: str) -> IndexRows:
        """The rows of the index of ``split``, to be read one by one; raises as `open_index` does."""
        info, index = self.split(split), self.open_index(split)
        offset = os.stat(self.folder / info.index_file).st_size - ROW_BYTES * len(index)
        return IndexRows(self.folder / info.index_file, offset, info.documents, _REMEDY)

    def check_index(self, split: str) -> NDArray[np.int64]:
        """`open_index`, and every row is possible: in order, inside its shard, adding up to its totals.

        Raises:
            UserError: it is not.
        """
        index, info = self.open_index(split), self.split(split)
        first, read, itemsize = 0, 0, np.dtype(self.dtype).itemsize
        for number, shard in enumerate(info.shards):
            rows = index[first : first + shard.documents]
            try:
                check_rows(rows, number, shard.tokens, shard.bytes, shard.size, itemsize)
            except ValueError as error:
                path = self.folder / info.index_file
                raise UserError(f"{path}: contradicts the manifest ({error}); {_REMEDY}") from error
            first += shard.documents
            read += shard.documents
            if read > _RELEASED_DOCUMENTS:
                release_pages(index)
                read = 0
        release_pages(index)
        return index

    def to_json(self) -> dict[str, Any]:
        """The manifest as it stands in manifest.json."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.dtype,
            "tokenizer": dataclasses.asdict(self.tokenizer),
            "splits": {name: split.to_json() for name, split in self.splits.items()},
            "preparation": dict(self.preparation),
            "fingerprint": self.fingerprint,
        }
        return {**content, "checksum": _checksum(content)}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``folder/manifest.json`` by rename."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        data = text.encode(errors="backslashreplace")  # a name that is not UTF-8, as JSON escapes it
        if len(data) > MAX_MANIFEST_BYTES:
            raise UserError(
                f"{Path(folder) / MANIFEST_FILE}: would have {len(data):,} bytes, more than "
                f"{MAX_MANIFEST_BYTES:,}; make fewer shards: raise --shard_size_mb"
            )
        write_bytes_atomically(Path(folder) / MANIFEST_FILE, data)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read ``folder/manifest.json`` (a path to the file itself will do).

        Raises:
            UserError: missing, not JSON, another format or version, a key missing or of a wrong type, or a
                fingerprint or checksum that does not match the contents (a manifest edited by hand).
        """
        path = Path(folder)
        if path.name != MANIFEST_FILE:
            path = path / MANIFEST_FILE
        if not os.path.lexists(path):
            raise UserError(
                f"{path}: no such file, so not a finished dataset; make one with `dualroute prepare`"
            )
        try:
            content = parse_json(read_limited(path, MAX_MANIFEST_BYTES))
        except UserError as error:
            raise other_remedy(error, _REMEDY_FOR_FILES) from error
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); {_REMEDY_FOR_FILES}") from error
        return _Reader(path).manifest(content)


def parse_json(data: bytes) -> Any:
    """The value of a JSON text, strictly: no NaN or Infinity, no key twice, no nesting without end.

    Raises:
        ValueError: it is none; the message is one line.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number of JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands twice")
        return found

    try:
        return json.loads(data, parse_constant=refuse, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


class _Reader:
    """Turns parsed JSON into a Manifest, naming the file and the key wherever the two do not fit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def refuse(self, key: str, problem: str) -> UserError:
        return UserError(f"{self.path}: key {key!r} {problem}; {_REMEDY}")

    def get(self, mapping: Any, key: str, kind: type, where: str = "") -> Any:
        name = f"{where}.{key}" if where else key
        if not isinstance(mapping, dict) or key not in mapping:
            raise self.refuse(name, "is missing")
        value = mapping[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.refuse(name, f"must be {kind.__name__}, not {_shown(value)}")
        return value

    def count(self, mapping: Any, key: str, where: str, limit: int = _MAX_COUNT) -> int:
        value: int = self.get(mapping, key, int, where)
        if value <= 0:
            raise self.refuse(f"{where}.{key}", f"must be positive, not {_shown(value)}")
        if value > limit:
            raise self.refuse(f"{where}.{key}", f"must be at most {limit}, not {_shown(value)}")
        return value

    def file(self, mapping: Any, key: str, where: str) -> str:
        value: str = self.get(mapping, key, str, where)
        plain = 0 < len(value.encode(errors="replace")) < 256 and value.isprintable()
        if not plain or value in {".", ".."} or "/" in value or "\\" in value:
            raise self.refuse(f"{where}.{key}", f"must be a plain file name, not {_shown(value)}")
        return value

    def sha256(self, mapping: Any, key: str, where: str) -> str:
        value: str = self.get(mapping, key, str, where)
        if not re.fullmatch("[0-9a-f]{64}", value):
            raise self.refuse(f"{where}.{key}", f"must be 64 hexadecimal digits, not {_shown(value)}")
        return value

    def manifest(self, content: Any) -> Manifest:
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{self.path}: not a {FORMAT} manifest; make a dataset with `dualroute prepare`")
        if content.get("version") != VERSION or isinstance(content["version"], bool):
            found = _shown(content.get("version"))
            raise UserError(f"{self.path}: version {found}, this program reads version {VERSION}; {_REMEDY}")
        dtype = self.get(content, "dtype", str)
        if dtype not in _DTYPES:
            raise self.refuse("dtype", f"must be one of {', '.join(_DTYPES)}, not {_shown(dtype)}")
        splits = self.get(content, "splits", dict)
        if not splits or not all(re.fullmatch(r"[\w-]{1,64}", name) for name in splits):
            raise self.refuse("splits", f"must name one split or more, not {_shown(list(splits))}")
        manifest = Manifest(
            folder=self.path.parent,
            dtype=dtype,
            tokenizer=self.tokenizer(self.get(content, "tokenizer", dict), _DTYPES[dtype]),
            splits={
                name: self.split(name, self.get(splits, name, dict, "splits"), np.dtype(dtype).itemsize)
                for name in splits
            },
            preparation=self.get(content, "preparation", dict),
        )
        files = [manifest.tokenizer.file]
        for split in manifest.splits.values():
            files += [split.index_file, *(shard.file for shard in split.shards)]
        if len(set(files)) < len(files):
            twice = next(file for file in files if files.count(file) > 1)
            raise UserError(f"{self.path}: names the file {twice} twice; {_REMEDY}")
        if self.get(content, "fingerprint", str) != manifest.fingerprint:
            raise UserError(f"{self.path}: the fingerprint does not match the contents (edited?); {_REMEDY}")
        # older manifests have none
        if "checksum" in content and self.get(content, "checksum", str) != _checksum(content):
            raise UserError(f"{self.path}: the checksum does not match the contents (edited?); {_REMEDY}")
        return manifest

    def tokenizer(self, info: dict[str, Any], most_ids: int) -> TokenizerInfo:
        vocab_size = self.count(info, "vocab_size", "tokenizer", limit=most_ids)
        ids = {key: self.get(info, key, int, "tokenizer") for key in ("bos_id", "eos_id", "pad_id")}
        for key, value in ids.items():
            if not -1 <= value < vocab_size:
                raise self.refuse(f"tokenizer.{key}", f"must be below vocab_size, not {_shown(value)}")
        return TokenizerInfo(
            file=self.file(info, "file", "tokenizer"),
            sha256=self.sha256(info, "sha256", "tokenizer"),
            vocab_size=vocab_size,
            **ids,
        )

    def split(self, name: str, info: dict[str, Any], itemsize: int) -> Split:
        where = f"splits.{name}"
        index = self.get(info, "index", dict, where)
        shards = [
            self.shard(shard, f"{where}.shards[{number}]", itemsize)
            for number, shard in enumerate(self.get(info, "shards", list, where))
        ]
        split = Split(
            name=name,
            **{key: self.count(info, key, where) for key in ("documents", "tokens", "bytes")},
            index_file=self.file(index, "file", f"{where}.index"),
            index_sha256=self.sha256(index, "sha256", f"{where}.index"),
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

    def shard(self, info: Any, where: str, itemsize: int) -> Shard:
        shard = Shard(
            file=self.file(info, "file", where),
            **{key: self.count(info, key, where) for key in ("documents", "tokens", "bytes", "size")},
            sha256=self.sha256(info, "sha256", where),
        )
        if not shard.documents <= shard.tokens <= shard.size // itemsize:
            raise self.refuse(
                f"{where}.tokens",
                f"is {shard.tokens}, which {shard.documents} documents in {shard.size} bytes cannot have",
            )
        return shard


def shard_from_json(path: Path, info: Any, itemsize: int) -> Shard:
    """The shard that ``info``, an object in the JSON file ``path``, describes as a manifest would.

    Raises:
        UserError: names the key that does not fit.
    """
    return _Reader(path).shard(info, "shard", itemsize)


def _checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest but for its key ``checksum``: what the fingerprint leaves out is covered too."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(canonical_json(rest)).hexdigest()


def _shown(value: Any) -> str:
    """A value for a message: one line, not endless."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"a very large {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def bad_files(
    manifest: Manifest,
    split: str,
    level: Literal["size", "sha256"] = "size",
    hash_file: Callable[[Path], str] = file_sha256,
) -> Iterator[tuple[str, str]]:
    """What differs between the manifest and the files of ``split``, tokenizer and index included.

    Args:
        level: see `verify_shards`.
        hash_file: path → hexadecimal SHA-256.

    Yields:
        The name of a file and the line that says what is wrong with it.
    """
    info = manifest.split(split)
    expected: list[tuple[str, int | None, str]] = [
        (manifest.tokenizer.file, None, manifest.tokenizer.sha256),
        (info.index_file, None, info.index_sha256),
        *((shard.file, shard.size, shard.sha256) for shard in info.shards),
    ]
    for file, size, sha256 in expected:
        path = manifest.folder / file
        try:
            require_regular(path)
            if file == info.index_file:
                manifest.check_index(split)
            found = path.stat().st_size
            # index and tokenizer decide what every token means, and take no time to hash
            different = level == "sha256" or size is None
            different = (size is None or found == size) and different and hash_file(path) != sha256
        except UserError as error:
            yield file, str(other_remedy(error, _REMEDY_FOR_FILES))
        except OSError as error:
            yield file, f"{path}: cannot be read ({error.strerror}); {_REMEDY_FOR_FILES}"
        else:
            if size is not None and found != size:
                yield file, f"{path}: {found} bytes, the manifest says {size}; {_REMEDY_FOR_FILES}"
            elif different:
                yield file, f"{path}: contents differ from the manifest (sha256); {_REMEDY_FOR_FILES}"


def verify_shards(manifest: Manifest, split: str, level: Literal["size", "sha256"] = "size") -> None:
    """Check the files of ``split``: the index and the tokenizer whole, the shards by ``level``.

    Args:
        level: ``size`` compares the shards' sizes (instant), ``sha256`` their contents too.

    Raises:
        UserError: names the first file that is missing, has another size or other contents, or is no index.
        ValueError: an unknown level.
    """
    if level not in ("size", "sha256"):
        raise ValueError(f"level must be 'size' or 'sha256', not {level!r}")
    for _, line in bad_files(manifest, split, level):
        raise UserError(line)
