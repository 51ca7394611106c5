"""Is a data set what its manifest says?  At every start of a training, and on request.

In: a dataset folder. Here: its files are compared with `manifest`. Out: nothing, or a line for each bad file.

- `verify_once`, which `module` calls at every start: index, tokenizer and the shards' sizes each time; the
  shards' contents once per copy of the data, remembered beside the manifest by size and modification time.
- ``dualroute data verify``: everything, whatever is remembered. A disk that loses a bit keeps the time of the
  file, so only this finds it. Of a set elsewhere it brings and hashes every file, past the copies.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dualroute.data.manifest import Manifest, bad_files, parse_json, verify_shards
from dualroute.data.remote.config import BadDataPolicy
from dualroute.errors import UserError
from dualroute.files import file_sha256, read_limited, write_bytes_atomically
from dualroute.paths import DataPath
from dualroute.settings import check_fields

VERIFIED_FILE = ".verified.json"
_MAX_NOTE_BYTES = 64 << 20
_log = logging.getLogger(__name__)


def verify_once(
    manifest: Manifest, level: Literal["size", "sha256"], policy: BadDataPolicy | None = None
) -> None:
    """`verify_shards` for every split; shards that were hashed and look untouched since are not hashed again.

    After a successful ``sha256`` check the sizes and modification times are noted in `VERIFIED_FILE` beside
    the manifest. Where the folder cannot be written, nothing is noted and the next start hashes again.

    Under a ``policy`` that skips, damaged shards are named in warnings and nothing is noted.

    Raises:
        UserError: naming the first bad file.
    """
    skips = policy is not None and policy.on_bad_data == "skip"
    check = _warn_of_bad_shards if skips else verify_shards
    for split in manifest.splits:
        check(manifest, split, "size")
    if level == "size" or manifest.mirror is not None:  # whose copies were hashed when they were brought
        return
    try:
        seen = _file_stamps(manifest)
    except OSError:  # a shard is missing, and the policy lets it
        return
    path = manifest.folder / VERIFIED_FILE
    try:
        if parse_json(read_limited(path, _MAX_NOTE_BYTES)) == seen:
            return
    except ValueError:  # a UserError too
        pass  # no note, or half of one: the same as never verified
    good = [check(manifest, split, "sha256") is not False for split in manifest.splits]
    if all(good):
        _note(manifest, seen)


def _warn_of_bad_shards(manifest: Manifest, split: str, level: Literal["size", "sha256"]) -> bool:
    """Whether all shards are good; raises a UserError for a bad index or tokenizer, which all depends on."""
    shards, good = {shard.file for shard in manifest.split(split).shards}, True
    for file, line in bad_files(manifest, split, level):
        if file not in shards:
            raise UserError(line)
        good = False
        _log.warning("%s (data.on_bad_data skip: windows of it are left out)", line)
    return good


def _note(manifest: Manifest, stamps: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a read-only folder is a normal place for data
        write_bytes_atomically(manifest.folder / VERIFIED_FILE, json.dumps(stamps, indent=1).encode())


def _file_stamps(manifest: Manifest) -> dict[str, Any]:
    """What `VERIFIED_FILE` holds: the fingerprint, and [bytes, mtime in ns] of every file that it covers."""
    files = [manifest.tokenizer.file]
    for split in manifest.splits.values():
        files += [split.index_file, *(shard.file for shard in split.shards)]
    stats = {file: (manifest.folder / file).stat() for file in files}
    return {
        "fingerprint": manifest.fingerprint,
        "files": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
    }


@dataclass(frozen=True)
class VerifyDataConfig:
    """Compare every file of a data set with its manifest, by content.

    Args:
        data: dataset folder, or the address of a set elsewhere.
        progress: show progress on stderr.
    """

    data: DataPath
    progress: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "")


def verify_data(config: VerifyDataConfig) -> int:
    """``dualroute data verify``: hash shards, indices and tokenizer; print a line for each bad file.

    A good data set is noted as verified, a damaged one is not any more: the next start hashes it again.

    Returns:
        The exit status: 0, or 1 when a file is damaged.

    Raises:
        UserError: there is no manifest, or it is damaged itself.
    """
    manifest = Manifest.load(config.data)
    progress = _Progress(manifest, config.progress)
    stamps: dict[str, Any] | None = None
    if manifest.mirror is None:
        with contextlib.suppress(OSError):  # a file is missing; it is named below
            stamps = _file_stamps(manifest)
    damaged: set[str] = set()
    for split in manifest.splits:
        for file, line in bad_files(manifest, split, "sha256", progress.hash_file):
            if file not in damaged:  # the tokenizer belongs to every split
                damaged.add(file)
                print(f"damaged: {line}", flush=True)
    files = 1 + sum(1 + len(split.shards) for split in manifest.splits.values())
    if damaged or (stamps is None and manifest.mirror is None):
        with contextlib.suppress(OSError):
            (manifest.folder / VERIFIED_FILE).unlink()
        print(f"{manifest.place}: {len(damaged)} of {files} files are damaged; copy them again")
        return 1
    if stamps is not None:
        _note(manifest, stamps)
    size = progress.hashed if manifest.mirror is None else progress.total
    print(f"good: {manifest.place} ({files} files, {size:,} bytes{'' if stamps else ' of shards'})")
    return 0


class _Progress:
    """Hashes files and says on stderr how far it is: over the same line on a terminal."""

    def __init__(self, manifest: Manifest, enabled: bool) -> None:
        self.total = sum(shard.size for split in manifest.splits.values() for shard in split.shards)
        self._enabled = enabled and sys.stderr.isatty()
        self._done: dict[Path, str] = {}
        self.hashed = 0

    def hash_file(self, path: Path) -> str:
        if path not in self._done:
            if self._enabled:
                share = 100 * self.hashed / max(self.total, 1)
                print(f"\r{min(share, 100):3.0f} %  {path.name}\x1b[K", end="", file=sys.stderr, flush=True)
            self._done[path] = file_sha256(path)
            self.hashed += path.stat().st_size
            if self._enabled:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        return self._done[path]
