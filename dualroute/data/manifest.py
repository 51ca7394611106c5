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
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from dualroute.data.index import HEADER_BYTES, ROW_BYTES, IndexRows, check_rows, map_index, release_pages
from dualroute.data.manifest_parts import Shard, Split, TokenizerInfo, canonical_json, token_dtype
from dualroute.data.remote.address import shown
from dualroute.data.remote.config import RemoteOptions
from dualroute.data.remote.http_transfer import Unreachable
from dualroute.data.remote.mirror import Mirror
from dualroute.errors import UserError, other_remedy
from dualroute.files import file_sha256, parse_json, read_limited, require_regular, write_bytes_atomically
from dualroute.paths import is_remote

__all__ = [
    "MANIFEST_FILE", "MAX_MANIFEST_BYTES", "TOKENIZER_FILE", "Manifest", "Shard", "Split", "TokenizerInfo",
    "bad_files", "canonical_json", "parse_json", "shard_from_json", "token_dtype", "verify_shards",
]  # fmt: skip
FORMAT = "dualroute-shards"
VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.model"
#: Of manifest.json: 200 bytes a shard, so some 300,000 shards.
MAX_MANIFEST_BYTES = 64 << 20
_MAX_TOKENIZER_BYTES = 256 << 20
_MAX_COUNT = 1 << 53  # of anything that is counted; exact in a float too
_RELEASED_DOCUMENTS = 1 << 20  # 32 MiB of an index
_DTYPES = {"uint16": 1 << 16, "uint32": 1 << 32}  # and how many ids they tell apart
_log = logging.getLogger(__name__)
_REMEDY = "run `dualroute prepare` again"
_REMEDY_FOR_FILES = f"copy it again, or {_REMEDY}"


@dataclass(frozen=True)
class Manifest:
    """A complete dataset folder.

    Attributes:
        folder: where it lies; not part of the fingerprint, so a folder may be moved or copied. Of a set that
            lies elsewhere, where its copies are: tokenizer and index; shards come with `open_shard`.
        dtype: of the stored ids, ``uint16`` or ``uint32``.
        tokenizer, splits: what is in it.
        preparation: options and counts of the run that made it, for people; not part of the fingerprint.
        mirror: brings the files of a set that lies elsewhere; None for a folder.
    """

    folder: Path
    dtype: str
    tokenizer: TokenizerInfo
    splits: Mapping[str, Split]
    preparation: Mapping[str, Any] = field(default_factory=dict)
    mirror: Mirror | None = field(default=None, compare=False, repr=False)

    @property
    def place(self) -> str:
        """Folder or address, for messages."""
        return str(self.folder) if self.mirror is None else self.mirror.shown

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
            raise UserError(f"{self.place}: no split {name!r}; it has {known}")
        return self.splits[name]

    def shard_paths(self, split: str) -> list[Path]:
        """Paths of a split's tars, in the order of the index's shard numbers; those of a set elsewhere are
        brought."""
        if self.mirror is None:
            return [self.folder / shard.file for shard in self.split(split).shards]
        return [self.mirror.get(one.file, one.sha256, one.size) for one in self.split(split).shards]

    def open_shard(self, shard: Shard, wait: bool = False) -> IO[bytes]:
        """A tar, opened to be read; a copy of one that lies elsewhere stays as long as it, or a map of it,
        is open.

        Raises:
            UserError: it is missing, no regular file, or cannot be read.
            UnusableData: it lies elsewhere and cannot be had, or is not what it should be.
        """
        if self.mirror is not None:
            return self.mirror.open(shard.file, shard.sha256, shard.size, wait)
        path = self.folder / shard.file
        require_regular(path)
        return open(path, "rb")

    def _index_path(self, info: Split) -> Path:
        """The index file, brought if it lies elsewhere."""
        if self.mirror is None:
            return self.folder / info.index_file
        size = HEADER_BYTES + ROW_BYTES * info.documents
        return self.mirror.get(info.index_file, info.index_sha256, limit=size)

    def open_index(self, split: str) -> NDArray[np.int64]:
        """Memory map of the index of ``split``: int64 (documents, 4), columns `INDEX_COLUMNS`, in order.

        Raises:
            UserError: the file is missing, damaged, or does not fit the manifest.
        """
        info = self.split(split)
        return map_index(self._index_path(info), info.documents, _REMEDY)

    def index_rows(self, split: str) -> IndexRows:
        """The rows of the index of ``split``, to be read one by one; raises as `open_index` does."""
        info, index = self.split(split), self.open_index(split)  # which is brought where it lies elsewhere
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
            "tokenizer": self.tokenizer.to_json(),
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
    def load(cls, folder: str | os.PathLike[str], remote: RemoteOptions | None = None) -> Manifest:
        """Read ``folder/manifest.json`` (a path to the file itself will do).

        Args:
            folder: or the address of a set that lies elsewhere, see `dualroute.data.remote`.
            remote: how such a set is read; None for the defaults.

        Raises:
            UserError: missing, not to be reached, not JSON, another format or version, a key missing or of a
                wrong type, or a
                fingerprint or checksum that does not match the contents (a manifest edited by hand).
        """
        if is_remote(folder):
            return _load_remote(os.fspath(folder), remote)
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


def _load_remote(address: str, options: RemoteOptions | None) -> Manifest:
    """The manifest at an address, with its tokenizer brought; the last one seen there if nobody answers."""
    address = address.removesuffix(f"/{MANIFEST_FILE}")
    mirror = Mirror(address, options)
    path = f"{shown(address)}/{MANIFEST_FILE}"
    try:
        data = mirror.read_first(MANIFEST_FILE, MAX_MANIFEST_BYTES)
    except Unreachable as error:
        if not mirror.use_last():
            raise UserError(
                f"{mirror.shown}/{MANIFEST_FILE}: {error}; check the connection and run again"
            ) from error
        last = f"its copies in {mirror.folder} are read, as it was when it was last seen"
        _log.warning("%s: %s; %s", mirror.shown, error, last)
        data = read_limited(mirror.folder / MANIFEST_FILE, MAX_MANIFEST_BYTES)
    try:
        content = parse_json(data)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {_REMEDY_FOR_FILES}") from error
    read = _Reader(path).manifest(content)
    mirror.use(read.fingerprint)
    manifest = dataclasses.replace(read, folder=mirror.folder, mirror=mirror)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    indices = sum(ROW_BYTES * split.documents for split in manifest.splits.values())
    sizes = [shard.size for shard in shards]
    mirror.check_fits(indices, max(sizes), indices + sum(sizes))
    if not (mirror.folder / MANIFEST_FILE).exists():
        write_bytes_atomically(mirror.folder / MANIFEST_FILE, data)
    mirror.get(manifest.tokenizer.file, manifest.tokenizer.sha256, limit=_MAX_TOKENIZER_BYTES)
    return manifest


class _Reader:
    """Turns parsed JSON into a Manifest, naming the file and the key wherever the two do not fit."""

    def __init__(self, path: Path | str) -> None:
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
            folder=Path(self.path).parent,
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
            settings=self.get({"settings": {}, **info}, "settings", dict, "tokenizer"),
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
    if manifest.mirror is not None:
        yield from _bad_remote_files(manifest, manifest.mirror, info, level)
        return
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


def _bad_remote_files(
    manifest: Manifest, mirror: Mirror, info: Split, level: Literal["size", "sha256"]
) -> Iterator[tuple[str, str]]:
    """`bad_files` of a set elsewhere: its index at every level, for ``sha256`` all that lies there, and
    copies."""
    try:
        manifest.check_index(info.name)
    except UserError as error:
        yield info.index_file, str(error)
        return
    if level == "size":
        return  # copies were compared when they were brought, and others will be
    tokenizer, longest = manifest.tokenizer, HEADER_BYTES + ROW_BYTES * info.documents
    small = (
        (tokenizer.file, tokenizer.sha256, _MAX_TOKENIZER_BYTES),
        (info.index_file, info.index_sha256, longest),
    )
    for file, sha256, limit in small:
        if line := mirror.check_there(file, sha256, None, limit):
            yield file, line
    for shard in info.shards:
        if line := mirror.check_there(shard.file, shard.sha256, shard.size, shard.size):
            yield shard.file, line
        if mirror.holds(shard.file, shard.size) and file_sha256(mirror.folder / shard.file) != shard.sha256:
            mirror.discard(shard.file)
            _log.warning("%s: the copy was damaged and is removed", mirror.folder / shard.file)


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
