"""One attempt after another to bring a file from a server, without ever joining bytes of two versions.

Comes in: a URL and the place of the unfinished file. Goes out: a complete file, to `data_prep.download` or
`dualroute.data.remote.disk_cache`, which compare it with its checksum.

1. Where the file has a checksum, what was begun is continued in any case: a wrong join will be found.
2. Otherwise only under the server's own name for that version (a strong ETag, or a Last-Modified well in the
   past), which ``NAME.part.json`` keeps together with how many bytes have reached the disk; the server has to
   repeat name, place and length. All else comes from its start.
3. Without a checksum a file whose length the server does not tell, and which does not come in chunks either,
   is refused: nobody could know that it is whole.
4. No wait is without an end: a server that is silent for the time allowed, or sends less than 1 KiB/s over
it,
   counts as a broken connection.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hashlib
import http.client
import json
import netrc
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from dualroute.errors import UserError, other_remedy
from dualroute.files import parse_json, read_limited, require_regular, write_bytes_atomically

MAX_BYTES = 256 << 30  # of a file; the largest known corpus file has 2.3 GB
MAX_REDIRECTS = 5
_BLOCK = 1 << 20
_SYNC_BYTES = 64 << 20  # written between two notes of what has reached the disk
_STRONG_AGE_SECONDS = 60  # of a Last-Modified, before it names one version only (RFC 9110, 8.8.2.2)
_SLOWEST = 1 << 10  # bytes a second; less counts as a broken connection
_USER_AGENT = "dualroute/0.1"  # some hosts refuse Python's own
#: Answers that another attempt may mend (RFC 9110, 6585).
_PASSING = {408, 425, 429, 500, 502, 503, 504}

#: Called with (bytes so far, total bytes or None).
Report = Callable[[int, "int | None"], None]


class Unreachable(Exception):
    """A store did not deliver; the message says why.

    Attributes:
        permanent: another attempt will not help.
        after: seconds that the server asks to be left alone for; None if it does not.
    """

    def __init__(self, message: str, permanent: bool = False, after: float | None = None) -> None:
        super().__init__(message)
        self.permanent, self.after = permanent, after


@dataclass(frozen=True)
class _Version:
    """What the server calls the file, as kept in ``NAME.part.json``.

    Attributes:
        url: SHA-256 of that which answered: it may hold a secret.
        validator: a strong ETag, or a Last-Modified; "" if there is none that names one version.
        total: bytes of the whole file; None if it is not known.
        bytes: of the unfinished file, that have reached the disk.
    """

    url: str
    validator: str
    total: int | None
    bytes: int = 0


class Part:
    """The unfinished file, and what is known of the version that it is part of.

    Args:
        destination: the final path.
        url: to continue from.
        checked: a checksum is known, so what is wrongly joined will be found.
        limit: bytes that the file may have; None for `MAX_BYTES`.
    """

    def __init__(self, destination: Path, url: str, checked: bool, limit: int | None = None) -> None:
        self.url, self.checked = url, checked
        self.limit = MAX_BYTES if limit is None else limit
        self._url_digest = hashlib.sha256(url.encode(errors="surrogateescape")).hexdigest()
        self.path = destination.with_name(destination.name + ".part")
        self._note = destination.with_name(destination.name + ".part.json")
        destination.with_name(destination.name + ".part.etag").unlink(missing_ok=True)  # of an older program

    @property
    def size(self) -> int:
        """Bytes of the unfinished file."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def version(self) -> _Version | None:
        """What the unfinished file is part of; None if that cannot be told."""
        try:
            found = _Version(**parse_json(read_limited(self._note, 1 << 16)))
        except (ValueError, TypeError):  # a UserError too
            return None
        numbers = (found.bytes, 0 if found.total is None else found.total)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            return None
        sound = isinstance(found.url, str) and isinstance(found.validator, str)
        return found if sound and found.validator.isprintable() else None

    def begun(self) -> tuple[int, str]:
        """Bytes to continue after, and the validator to send with the request ("": none is needed)."""
        if not self.path.is_file():
            return 0, ""
        size, version = self.path.stat().st_size, self.version()
        same_server = version is not None and version.url == self._url_digest and version.validator
        if version is not None and same_server and version.bytes <= size:
            with open(self.path, "rb+") as stream:
                stream.truncate(version.bytes)  # what comes after may never have reached the disk
            return version.bytes, version.validator
        return (size, "") if self.checked else (0, "")

    def open(self, mode: str) -> IO[bytes]:
        """The unfinished file, to write in."""
        if os.path.lexists(self.path):
            try:
                require_regular(self.path)  # to open a FIFO would wait for ever
            except UserError as error:
                raise other_remedy(error, "remove it and run again") from error
        return open(self.path, mode)

    def keep(self, validator: str, total: int | None, done: int) -> None:
        """Note that ``done`` bytes of the version ``validator`` have reached the disk."""
        version = _Version(self._url_digest, validator, total, done)
        write_bytes_atomically(self._note, json.dumps(asdict(version)).encode())

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)


def transfer(part: Part, report: Report | None, timeout: float) -> None:
    """`attempt`, taken up again at once as long as every attempt gets further than any before."""
    best = part.size
    while True:
        try:
            return attempt(part, report, timeout)
        except Unreachable:
            reached = part.size
            if reached <= best:
                raise
            best = reached


def attempt(part: Part, report: Report | None, timeout: float) -> None:
    """Bring what is missing of the file; return only when it is known to be complete.

    Raises:
        Unreachable: it is not.
        OSError: of the disk.
    """
    start, validator = part.begun()
    request = urllib.request.Request(part.url, headers={"User-Agent": _USER_AGENT})
    if credentials := _credentials(part.url):
        request.add_unredirected_header("Authorization", credentials)
    if start:
        request.add_header("Range", f"bytes={start}-")
        if validator:
            request.add_header("If-Range", validator)  # another version comes from its start
    try:
        with _opener.open(request, timeout=timeout) as response:
            if start and not _continues(response, start, part, validator):
                if response.status == http.client.PARTIAL_CONTENT:
                    part.discard()
                    raise _Again
                start = 0  # the server sends everything
            _receive(response, start, part, report, timeout)
    except _Again:
        return attempt(part, report, timeout)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            if error.headers.get("Content-Range", "") == f"bytes */{start}":
                return  # everything had arrived, only the rename was missing
            part.discard()  # longer than the file: of another version
            return attempt(part, report, timeout)
        if 300 <= error.code < 400:
            raise Unreachable(
                f"the server sends elsewhere, too often or where it must not ({error.code})", permanent=True
            ) from error
        # not the words of the server, which may be anything
        raise Unreachable(
            f"the server answers {error.code} {http.client.responses.get(error.code, '')}".rstrip(),
            permanent=error.code not in _PASSING,
            after=_retry_after(error.headers),
        ) from error
    except urllib.error.URLError as error:
        raise Unreachable(f"no connection ({_one_line(error.reason)})") from error
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise Unreachable(f"the connection broke ({type(error).__name__})") from error
    except UserError:
        raise
    except ValueError as error:  # a redirect to what is no URL
        raise Unreachable(
            f"the server sends to an address that is none ({_one_line(error)})", True
        ) from error
    except OSError as error:
        error.filename = error.filename or str(part.path)  # no space, say: name the place
        raise


def _retry_after(headers: Any) -> float | None:
    """Seconds of a Retry-After (RFC 9110, 10.2.3); dates are left aside, for clocks differ."""
    value = (headers.get("Retry-After") or "").strip()
    return float(value) if re.fullmatch(r"\d{1,6}", value) else None


def _credentials(url: str) -> str | None:
    """Basic authorization for the URL's host, where the user's .netrc (or $NETRC) has it."""
    host = urllib.parse.urlsplit(url).hostname
    try:
        found = netrc.netrc(os.environ.get("NETRC")).hosts.get(host or "")
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):  # none, or not one that curl would take
        return None
    if found is None:
        return None
    return "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()


class _Again(Exception):
    """What was begun is of no use; ask for the whole file."""


def _one_line(value: object) -> str:
    return ascii(str(value))[1:-1][:200]


def _continues(response: http.client.HTTPResponse, start: int, part: Part, validator: str) -> bool:
    """Whether the answer is what follows the first ``start`` bytes of the file that was begun."""
    if response.status != http.client.PARTIAL_CONTENT:
        return False
    found = re.fullmatch(
        r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", response.headers.get("Content-Range", "")
    )
    if found is None or int(found[1]) != start:
        return False
    total = None if found[3] == "*" else int(found[3])
    if total is not None and not start <= int(found[2]) < total:
        return False
    if part.checked and not validator:
        return True
    version = part.version()
    if version is None or _validator(response.headers) not in ("", validator):
        return False
    return version.total is None or total is None or version.total == total


def _validator(headers: Any) -> str:
    """The server's name for one version of the file, fit for If-Range; "" if there is none."""
    etag = headers.get("ETag", "")
    if etag.startswith('"'):  # weak ones must not be used with ranges
        return etag if re.fullmatch(r'"[\x21\x23-\x7e]{1,500}"', etag) else ""
    modified, now = (_seconds(headers.get(key)) for key in ("Last-Modified", "Date"))
    if modified is None or now is None or now - modified < _STRONG_AGE_SECONDS:
        return ""
    return str(headers["Last-Modified"]).strip()


def _seconds(date: str | None) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp() if date else None
    except (ValueError, OverflowError, TypeError):
        return None


def _receive(
    response: http.client.HTTPResponse, start: int, part: Part, report: Report | None, timeout: float
) -> None:
    """Write the body behind the first ``start`` bytes; check that it is whole."""
    if response.status not in (http.client.OK, http.client.PARTIAL_CONTENT) or (
        response.status == http.client.PARTIAL_CONTENT and not start
    ):
        raise Unreachable(f"the server answers {response.status}, not the file")
    if (encoding := response.headers.get("Content-Encoding", "identity").strip().lower()) != "identity":
        raise Unreachable(f"the server sends the file compressed ({_one_line(encoding)}), unasked", True)
    total = _total_length(response, start)
    if total is None and not response.chunked and not part.checked:
        raise Unreachable(
            "the server does not say how long the file is, and no checksum of it is known", permanent=True
        )
    if total is not None and total > part.limit:
        raise Unreachable(
            f"the file has {total:,} bytes, more than the {part.limit:,} allowed", permanent=True
        )
    earlier = part.version() if start else None
    validator = _validator(response.headers) or (earlier.validator if earlier is not None else "")
    with part.open("ab" if start else "wb") as stream:
        done, noted = start, start

        def note() -> None:
            stream.flush()
            os.fsync(stream.fileno())
            part.keep(validator, total, done)

        note()
        try:
            pace = Pace(timeout)
            while block := response.read1(_BLOCK):  # what has come, not what fills the block
                done += len(block)
                pace.add(len(block))
                if done > part.limit:
                    break
                stream.write(block)
                if report is not None:
                    report(done, total)
                if done - noted >= _SYNC_BYTES:
                    note()
                    noted = done
        except BaseException:
            with contextlib.suppress(OSError):  # on a full disk the note before this one stands
                note()
            raise
        note()
    if done > part.limit:
        part.discard()
        raise Unreachable(f"the server sends more than the {part.limit:,} bytes allowed", permanent=True)
    if total is not None and done != total:
        raise Unreachable(f"the connection broke after {done} of {total} bytes")


class Pace:
    """Ends a transfer that has become so slow that it is as good as broken."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._since, self._bytes = seconds, time.monotonic(), 0

    def add(self, count: int) -> None:
        """Count bytes that have come.

        Raises:
            Unreachable: they were fewer than 1 KiB/s over the last ``seconds``.
        """
        self._bytes += count
        passed = time.monotonic() - self._since
        if passed < self._seconds:
            return
        if self._bytes < _SLOWEST * passed:
            raise Unreachable(f"the server sends less than {_SLOWEST:,} bytes a second")
        self._since, self._bytes = time.monotonic(), 0


def _total_length(response: http.client.HTTPResponse, start: int) -> int | None:
    """Length of the whole file, if the server says it."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    if start and re.fullmatch(r"\d{1,18}", total):
        return int(total)
    length = (response.headers.get("Content-Length") or "").strip()
    if response.chunked or not length:
        return None
    if not re.fullmatch(r"\d{1,18}", length):
        raise Unreachable(f"the server states a length that is none ({_one_line(length)})")
    return start + int(length)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """A few redirects, never from https to what is not, never to another kind of address."""

    max_redirections = MAX_REDIRECTS
    max_repeats = 2

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        allowed = ("https",) if req.type == "https" else ("http", "https")
        if newurl.partition(":")[0].lower() not in allowed:
            raise urllib.error.HTTPError(req.full_url, code, "redirected elsewhere", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_opener = urllib.request.build_opener(_Redirects)
