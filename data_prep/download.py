"""Fetch a file over HTTP so that it is either complete and right, or not there.

Comes in: URLs (mirrors of one file, tried in order) and, where it is known, the file's SHA-256. Goes out:
a path in the download folder, for `corpora` to open. A download that was cut off continues where it
stopped (HTTP Range).

Where the registry states a checksum, the file must match it.
Where it cannot (a publisher that states none), the checksum of the first complete download is recorded in
``checksums.json`` beside the files, and every later download of that URL must match the record: trust on
first use. Delete the line to accept a new version.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from dualroute.errors import UserError
from dualroute.files import file_sha256, publish, write_bytes_atomically

CHECKSUMS_FILE = "checksums.json"
TIMEOUT_SECONDS = 30.0
_BLOCK = 1 << 20
_USER_AGENT = "dualroute-data-prep/0.1"  # some hosts refuse Python's own

#: Called with (bytes so far, total bytes or None).
Report = Callable[[int, "int | None"], None]


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

    Args:
        urls: mirrors of the same file; the next is tried when one cannot be reached or refuses.
        destination: final path; the unfinished file is ``destination`` + ``.part`` and survives failures.
        sha256: what the file must hash to; None for trust on first use.
        report: told about progress.
        timeout: seconds to wait for the server, per read.

    Raises:
        UserError: no mirror could be reached (offline), all refused, the transfer was cut, or the checksum
            is wrong.
    """
    if destination.exists():  # appeared by rename after its check
        return destination
    expected = sha256 or _recorded(destination.parent, urls[0])
    partial = destination.with_name(destination.name + ".part")
    failures = []
    for url in urls:
        try:
            _transfer_all(url, partial, report, timeout)
            break
        except _Unreachable as error:
            failures.append(f"{url}: {error}")
    else:
        raise UserError(
            f"cannot download {'; '.join(failures)}; check the connection and run again (it continues), "
            f"or fetch the file by other means to {destination}"
        )
    found = file_sha256(partial)
    if expected is not None and found != expected:
        partial.unlink()
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
    publish(partial, destination)
    partial.with_name(partial.name + ".etag").unlink(missing_ok=True)
    return destination


class _Unreachable(Exception):
    """One mirror did not deliver; the message says why."""


def _transfer_all(url: str, partial: Path, report: Report | None, timeout: float) -> None:
    """`_transfer`, taken up again at once as long as every attempt brings something."""
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            return _transfer(url, partial, report, timeout)
        except _Unreachable:
            if not partial.exists() or partial.stat().st_size <= before:
                raise


def _transfer(url: str, partial: Path, report: Report | None, timeout: float) -> None:
    """Append what is missing to ``partial``; return only when the server's length is reached."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    version_file = partial.with_name(partial.name + ".etag")  # the server's name for what was begun
    start = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": _USER_AGENT})
    if start:
        request.add_header("Range", f"bytes={start}-")
        if version_file.exists():
            request.add_header("If-Range", version_file.read_text())  # another version comes from its start
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            if start and response.status != http.client.PARTIAL_CONTENT:
                start = 0  # the server ignores ranges and sends everything
            total = _total_length(response, start)
            etag = response.headers.get("ETag", "")
            if etag.startswith('"'):  # weak ones must not be used with ranges
                version_file.write_text(etag)
            else:
                version_file.unlink(missing_ok=True)
            with open(partial, "ab" if start else "wb") as stream:
                done = start
                while block := response.read(_BLOCK):
                    stream.write(block)
                    done += len(block)
                    if report is not None:
                        report(done, total)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            if error.headers.get("Content-Range", "").endswith(f"/{start}"):
                return  # everything had arrived, only the rename was missing
            partial.unlink()  # longer than the file: of another version
            return _transfer(url, partial, report, timeout)
        raise _Unreachable(f"the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _Unreachable(f"no connection ({error.reason})") from error
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise _Unreachable(f"the connection broke ({type(error).__name__})") from error
    except OSError as error:
        error.filename = error.filename or str(partial)  # no space, say: name the place
        raise
    if total is not None and done < total:
        raise _Unreachable(f"the connection broke after {done} of {total} bytes")


def _total_length(response: http.client.HTTPResponse, start: int) -> int | None:
    """Length of the whole file, if the server says it."""
    content_range = response.headers.get("Content-Range", "")
    if start and content_range.rpartition("/")[2].isdigit():
        return int(content_range.rpartition("/")[2])
    length = response.headers.get("Content-Length")
    return start + int(length) if length else None


def _read_records(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS_FILE
    try:
        records = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); mend or delete it") from error
    if not isinstance(records, dict):
        raise UserError(f"{path}: must hold one JSON object of URL: sha256; mend or delete it")
    return records


def _recorded(folder: Path, url: str) -> str | None:
    return _read_records(folder).get(url)


def _record(folder: Path, url: str, sha256: str) -> None:
    records = _read_records(folder) | {url: sha256}
    write_bytes_atomically(
        folder / CHECKSUMS_FILE, (json.dumps(records, indent=1, sort_keys=True) + "\n").encode()
    )
