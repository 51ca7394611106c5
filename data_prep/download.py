"""Fetch a file over HTTP so that it is either complete and right, or not there.

Comes in: URLs (mirrors of one file, tried in order) and, where it is known, the file's SHA-256. Goes out:
a path in the download folder, for `corpora` to open. `dualroute.data.remote.http_transfer` does the
transfer; one that was cut off continues where it stopped, if it is certain to be the same file.

Where the registry states a checksum, the file must match it.
Where it cannot (a publisher that states none), the checksum of the first complete download is recorded in
``checksums.json`` beside the files, and every later download of that URL must match the record: trust on
first use. Delete the line to accept a new version. A file that is there already is compared too, once per
process.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from dualroute.data.remote.http_transfer import Part, Report, Unreachable, transfer
from dualroute.errors import UserError, other_remedy
from dualroute.files import (
    file_sha256,
    locked,
    parse_json,
    publish,
    read_limited,
    require_regular,
    write_bytes_atomically,
)

__all__ = ["CHECKSUMS_FILE", "Report", "default_download_folder", "fetch"]

CHECKSUMS_FILE = "checksums.json"
TIMEOUT_SECONDS = 30.0
_MAX_RECORD_BYTES = 16 << 20
_WAIT_SECONDS = 7 * 24 * 3600.0

_log = logging.getLogger(__name__)


def default_download_folder() -> Path:
    """``$DUALROUTE_DOWNLOADS``, else ``dualroute`` in the user's cache folder."""
    if folder := os.environ.get("DUALROUTE_DOWNLOADS"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualroute"


def fetch(
    urls: Sequence[str],
    destination: Path,
    sha256: str | None = None,
    report: Report | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> Path:
    """Download one file to ``destination`` unless it is there already, and give back its path.

    Two processes that want the same file do not write it together: the second waits for the first.

    Args:
        urls: mirrors of the same file; the next is tried when one cannot be reached or refuses.
        destination: final path; the unfinished file is ``destination`` + ``.part`` and survives failures.
        sha256: what the file must hash to; None for trust on first use.
        report: told about progress.
        timeout: seconds to wait for the server, per read.

    Raises:
        UserError: no mirror could be reached (offline), all refused, the transfer was cut, or the checksum
            is wrong, also of a file that is there.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    lock = destination.with_name(f".{destination.name}.lock")
    with locked(lock) as free:
        if free:
            return _fetch(urls, destination, sha256, report, timeout)
    _log.warning("waiting for another process that downloads %s", destination)
    with locked(lock, wait=_WAIT_SECONDS) as free:
        if free:
            return _fetch(urls, destination, sha256, report, timeout)
    raise UserError(f"{destination}: another process still downloads it; run again when it has ended")


def _fetch(
    urls: Sequence[str], destination: Path, sha256: str | None, report: Report | None, timeout: float
) -> Path:
    if os.path.lexists(destination):
        _check_present(destination, urls[0], sha256 or _recorded(destination.parent, urls[0]))
        return destination
    expected = sha256 or _recorded(destination.parent, urls[0])
    failures = []
    for url in urls:
        part = Part(destination, url, expected is not None)
        try:
            transfer(part, report, timeout)
            break
        except Unreachable as error:
            failures.append(f"{url}: {error}")
    else:
        raise UserError(
            f"cannot download {', '.join(failures)}; check the connection and run again (it continues), "
            f"or fetch the file by other means to {destination}"
        )
    found = file_sha256(part.path)
    if expected is not None and found != expected:
        part.discard()
        raise UserError(
            f"{url}: sha256 is {found}, expected {expected}; the file was deleted: run again if the "
            "transfer was at fault, else the publisher changed it"
            + (
                ""
                if sha256
                else f" (accept that by deleting the URL from {destination.parent / CHECKSUMS_FILE})"
            )
        )
    if expected is None:
        _record(destination.parent, urls[0], found)
    publish(part.path, destination)
    part.discard()
    _checked.add(_stamp(destination))
    return destination


_checked: set[tuple[str, int, int]] = set()


def _stamp(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path.absolute()), status.st_size, status.st_mtime_ns


def _check_present(destination: Path, url: str, expected: str | None) -> None:
    """Compare a file that is there already with its checksum; one that was put there is recorded."""
    try:
        require_regular(destination)
    except UserError as error:
        raise other_remedy(error, "remove it to download it again") from error
    if _stamp(destination) in _checked:
        return
    found = file_sha256(destination)
    if expected is None:
        _record(destination.parent, url, found)
    elif found != expected:
        raise UserError(
            f"{destination}: sha256 is {found}, expected {expected}; delete it to download it again"
        )
    _checked.add(_stamp(destination))


def _read_records(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS_FILE
    if not os.path.lexists(path):
        return {}
    try:
        records = parse_json(read_limited(path, _MAX_RECORD_BYTES))
    except UserError as error:
        raise other_remedy(error, "mend or delete it") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); mend or delete it") from error
    if not isinstance(records, dict):
        raise UserError(f"{path}: must hold one JSON object of URL: sha256; mend or delete it")
    for url, value in records.items():
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
            raise UserError(f"{path}: {url!a} has no sha256 of 64 hexadecimal digits; delete that line")
    return records


def _recorded(folder: Path, url: str) -> str | None:
    return _read_records(folder).get(url)


def _record(folder: Path, url: str, sha256: str) -> None:
    records = _read_records(folder) | {url: sha256}
    write_bytes_atomically(
        folder / CHECKSUMS_FILE, (json.dumps(records, indent=1, sort_keys=True) + "\n").encode()
    )
