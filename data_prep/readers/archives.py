"""Members of tar and zip archives, each read by its own name's ending.

Nothing is unpacked to the disk: a member's name, be it absolute or full of ``..``, is a label. Members that
are links, devices or sparse, hidden or excluded, or of an unknown kind, are counted and passed over.

tarfile takes a header that it cannot parse, and a file that was cut between members, for the end of the
archive; here both are errors. Several tars in one file are read one after another.
"""

from __future__ import annotations

import contextlib
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, cast

from data_prep.clean import matches
from data_prep.readers.documents import Document, ReadOptions
from data_prep.readers.streams import DamagedStream, Expansion, TarStream, counted, random_access
from data_prep.tally import readable
from dualroute.errors import UserError

_MAX_HEADERS = 1 << 20
_END_RECORD = struct.Struct("<4s6xH10x")  # of a zip: its signature, and how many members there are
_ENCRYPTED = 0x1  # among the flags of a zip's member

#: Reads a member: its stream and its name in full.
ReadMember = Callable[[IO[bytes], str], Iterator[Document]]


def hidden(name: str) -> bool:
    """Whether a part of a path starts with a dot."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _wanted(member: str, name: str, options: ReadOptions, unknown: Callable[[str], str | None]) -> bool:
    """Whether a member is to be read; counted if not. ``unknown`` gives the reason for a name's kind."""
    reason = unknown(member)
    if hidden(member):
        reason = "hidden"
    elif any(matches(readable(member), pattern) for pattern in options.exclude):
        reason = "excluded"
    if reason is not None:
        options.files.skip(reason, f"{name}!{member}")
    return reason is None


@contextlib.contextmanager
def _damage_named() -> Iterator[None]:
    """Whatever the library stumbles over in a header is damage of the file."""
    try:
        yield
    except (UserError, OSError, EOFError, tarfile.TarError, zipfile.BadZipFile):
        raise
    except Exception as error:
        raise DamagedStream(readable(error)[:200] or type(error).__name__) from error


@contextlib.contextmanager
def _supported(name: str) -> Iterator[None]:
    try:
        yield
    except NotImplementedError as error:  # a method of compression, a version, strong encryption
        raise UserError(f"{name}: {readable(error)}; pack the archive anew, by deflate") from error


def read_tar(
    stream: IO[bytes],
    name: str,
    options: ReadOptions,
    read: ReadMember,
    unknown: Callable[[str], str | None],
) -> Iterator[Document]:
    """Documents of the members, in their order."""
    blocks = TarStream(stream, name)
    base = 0
    while True:
        blocks.limit = base + _MAX_HEADERS
        with _damage_named():
            archive = tarfile.open(fileobj=cast(IO[bytes], blocks), mode="r|")  # noqa: SIM115
        with archive:
            for member in _members(archive, blocks, base):
                if member.isdir():
                    continue
                if not member.isfile() or member.issparse():
                    what = "link" if member.islnk() or member.issym() else "device or pipe"
                    what = "sparse file" if member.issparse() else what
                    options.files.skip(f"{what} in an archive", f"{name}!{member.name}")
                elif _wanted(member.name, name, options, unknown):
                    content = archive.extractfile(member)
                    assert content is not None  # of a regular file
                    yield from read(content, f"{name}!{readable(member.name)}")
        if not _at_end_mark(blocks, base + archive.offset):
            return
        base = blocks.length


def _members(archive: tarfile.TarFile, blocks: TarStream, base: int) -> Iterator[tarfile.TarInfo]:
    last = -1
    while True:
        blocks.limit = base + archive.offset + _MAX_HEADERS
        with _damage_named():
            member = archive.next()
        blocks.limit = None
        if member is None:
            return
        if member.offset <= last:  # a negative length leads back
            raise tarfile.ReadError(f"the length of the member at byte {base + last} is impossible")
        last = member.offset
        getattr(archive, "members", []).clear()  # else a million members stay in memory
        yield member


def _at_end_mark(blocks: TarStream, end: int) -> bool:
    """Check that an archive ended at byte ``end`` by its mark; whether another one follows it."""
    if not blocks.back_to(end):
        raise tarfile.ReadError("the mark of the archive's end is missing")
    mark = blocks.read(tarfile.BLOCKSIZE)
    if mark.strip(b"\0"):
        raise tarfile.ReadError(f"unreadable member header at byte {end}")
    if len(mark) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("the mark of the archive's end is missing")
    return blocks.skip_zeros()


def read_zip(
    stream: IO[bytes],
    name: str,
    options: ReadOptions,
    read: ReadMember,
    unknown: Callable[[str], str | None],
    expansion: Expansion,
) -> Iterator[Document]:
    """Documents of the members, in the order of the archive's directory."""
    stream = random_access(stream, name)
    with _damage_named(), _supported(name):
        archive = zipfile.ZipFile(stream)
    with archive:
        _check_directory(archive, stream)
        for member in archive.infolist():
            if member.filename.endswith("/") or not _wanted(member.filename, name, options, unknown):
                continue
            full_name = f"{name}!{readable(member.filename)}"
            if member.flag_bits & _ENCRYPTED:
                raise UserError(
                    f"{full_name}: is encrypted; unpack the archive with its password first, or leave it out "
                    f"with exclude"
                )
            with _damage_named(), _supported(full_name):
                content = archive.open(member)
            with content:
                yield from read(counted(content, expansion, member.file_size), full_name)


def _check_directory(archive: zipfile.ZipFile, stream: IO[bytes]) -> None:
    """Compare the number of members with what the archive's last record says.

    The library does not, and goes from member to member by lengths that no checksum covers.
    """
    stream.seek(-(_END_RECORD.size + len(archive.comment)), io.SEEK_END)
    signature, said = _END_RECORD.unpack(stream.read(_END_RECORD.size))
    found = len(archive.infolist())
    if signature != b"PK\5\6" or said not in (found, 0xFFFF):  # which stands for more than it can hold
        raise zipfile.BadZipFile(f"its directory lists {found} members and should list {said}")
