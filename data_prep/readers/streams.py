"""Compressed streams that tell when they were cut off, and never hand out more than was asked for.

Comes in: an open file and the ending of its name. Goes out: the stream inside, to `formats` and `archives`.

Libraries are lenient where a corpus must not be. Python's readers of xz and bz2 pass over damage after the
first stream, the zstandard library's takes a frame that ends too early for the end of the file; so this
module feeds those decoders itself. A few megabytes can be made to unpack to terabytes: `Expansion` counts.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from typing import IO, Any, cast

import zstandard

from dualroute.errors import UserError

COMPRESSION_ENDINGS = (".gz", ".xz", ".bz2", ".zst")
MAX_EXPANSION = 1000
_FREE_EXPANSION = 1 << 30  # bytes that any file may unpack to
_MAX_WINDOW = 1 << 31  # of zstd: `--long=31`, which is the most there is
_XZ_MEMORY = 1 << 31  # its largest preset takes 65 MiB
_BLOCK = 1 << 20
_INPUT = 1 << 16
_ZSTD_INPUT = 1 << 9  # one byte may stand for 32 KiB, and all that a call decodes comes out at once


class DamagedStream(EOFError):
    """A compressed stream that is cut off or is followed by what does not belong to it."""


#: What the readers of compressed files and archives raise for a damaged or truncated file.
DAMAGE = (
    EOFError,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    zstandard.ZstdError,
    tarfile.TarError,
    zipfile.BadZipFile,
)


class Expansion:
    """How many bytes one file has unpacked to; refuses a decompression bomb.

    Args:
        name: of the file, for the message.
        size: its bytes on the disk.
    """

    def __init__(self, name: str, size: int) -> None:
        self._name, self._size = name, size
        self._limit = max(_FREE_EXPANSION, MAX_EXPANSION * size)
        self._bytes = 0

    def add(self, count: int) -> None:
        self._bytes += count
        if self._bytes > self._limit:
            raise UserError(
                f"{self._name}: {self._size:,} bytes unpack to more than {self._limit:,}, like a "
                f"decompression bomb; if it is none, unpack it yourself and give the result"
            )


def decompress(stream: IO[bytes], ending: str, expansion: Expansion) -> IO[bytes]:
    """The stream inside a compression; reading it raises one of `DAMAGE` if it is cut off."""
    if ending == ".gz":
        if not cast(io.BufferedReader, stream).peek(1):
            raise DamagedStream("it is empty, not even a gzip header")
        return counted(cast(IO[bytes], gzip.GzipFile(fileobj=stream)), expansion)
    decoder: _Decoder
    if ending == ".xz":
        decoder = _Decoder(stream, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY), "xz", padding=True)
    elif ending == ".bz2":
        decoder = _Decoder(stream, bz2.BZ2Decompressor, "bzip2")
    else:
        decoder = _ZstdDecoder(stream, _new_zstd, "zstd")
    return counted(cast(IO[bytes], decoder), expansion)


def counted(stream: IO[bytes], expansion: Expansion, length: int | None = None) -> IO[bytes]:
    """The same bytes, counted as unpacked; an error where they end after other than ``length`` bytes."""
    return io.BufferedReader(_Counted(stream, expansion, length), _INPUT)


class _Counted(io.RawIOBase):
    def __init__(self, stream: Any, expansion: Expansion, length: int | None) -> None:
        self._stream, self._expansion, self._missing = stream, expansion, length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._stream.readinto(buffer)
        self._expansion.add(count)
        if self._missing is not None:
            self._missing -= count
            if not count and self._missing:
                raise DamagedStream("a member's length is not what the archive says")
        return count


class _Decoder(io.RawIOBase):
    """Compressed streams, one after another, as ``cat a.xz b.xz`` makes them.

    Args:
        stream: compressed.
        new: makes a decoder with the interface of `bz2.BZ2Decompressor`.
        what: for messages.
        padding: zeros may stand between streams, as in xz.
    """

    def __init__(self, stream: IO[bytes], new: Callable[[], Any], what: str, padding: bool = False) -> None:
        self._stream, self._new, self._what, self._padding = stream, new, what, padding
        self._decoder = new()
        self._started = False  # some of the present stream has been fed
        self._streams = 0  # that have ended

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            block = self._input()
            if block is None:
                return 0
            try:
                data = self._decode(block, len(buffer))
            except OSError as error:  # bz2's word for damage
                raise DamagedStream(str(error)) from error
            if data:
                buffer[: len(data)] = data
                return len(data)

    def _input(self) -> bytes | None:
        """Bytes for the decoder, which may be none if it holds some; None at the end of the file."""
        block = b""
        if self._decoder.eof:
            block = self._decoder.unused_data
            self._decoder, self._started = self._new(), False
            self._streams += 1
        elif not self._decoder.needs_input:
            return b""
        while True:
            block = block or self._stream.read(_INPUT)
            if self._padding and not self._started and self._streams:
                padded, block = block, block.lstrip(b"\0")
                if padded and not block:
                    continue
            if block:
                self._started = True
                return block
            if self._started or not self._streams:
                raise DamagedStream(f"the {self._what} stream ends too early")
            return None

    def _decode(self, block: bytes, size: int) -> bytes:
        data: bytes = self._decoder.decompress(block, size)
        return data


class _ZstdDecoder(_Decoder):
    """zstd frames; the decoder knows no limit to what it gives out, so it is fed little at a time."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._ready = memoryview(b"")
        self._fed = b""

    def _input(self) -> bytes | None:
        if self._ready:
            return b""
        if self._decoder.eof:
            self._fed = self._decoder.unused_data + self._fed
            self._decoder, self._started = self._new(), False
            self._streams += 1
        self._fed = self._fed or self._stream.read(_INPUT)
        if self._fed:
            self._started = True
            block, self._fed = self._fed[:_ZSTD_INPUT], self._fed[_ZSTD_INPUT:]
            return block
        if self._started or not self._streams:
            raise DamagedStream("the zstd stream ends inside a frame")
        return None

    def _decode(self, block: bytes, size: int) -> bytes:
        if not self._ready:
            self._ready = memoryview(self._decoder.decompress(block))
        data, self._ready = self._ready[:size], self._ready[size:]
        return bytes(data)


def _new_zstd() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()


def random_access(stream: IO[bytes], name: str) -> IO[bytes]:
    """A stream of the same bytes in which one may jump about: itself, or a copy in a temporary file.

    A member of a streamed tar says that it can, but cannot.

    Raises:
        UserError: there is no room for the copy.
    """
    if not isinstance(stream, tarfile.ExFileObject) and stream.seekable():
        return stream
    copy = cast(IO[bytes], tempfile.TemporaryFile(prefix="dualroute-"))  # noqa: SIM115
    try:
        while block := stream.read(_BLOCK):
            _append(copy, block, name)
        copy.seek(0)
    except BaseException:
        copy.close()
        raise
    return copy


def _append(copy: IO[bytes], block: bytes, name: str) -> None:
    try:
        copy.write(block)
        copy.flush()
    except OSError as error:
        raise UserError(
            f"{name}: its copy in {tempfile.gettempdir()} cannot be written ({error.strerror}); set TMPDIR "
            f"to a folder with room, or unpack the file first"
        ) from error


_UNDECODABLE = "dualroute-undecodable"
codecs.register_error(_UNDECODABLE, lambda error: ("\udcff", cast(UnicodeDecodeError, error).end))


def utf8(stream: IO[bytes]) -> tuple[IO[bytes], str | None]:
    """The stream in UTF-8, and what it was in when its first bytes say UTF-16 or UTF-32.

    What cannot be decoded becomes the byte 0xff, for whoever reads UTF-8 to deal with.
    """
    head = cast(io.BufferedReader, stream).peek(4)[:4]
    for mark, encoding in (
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if head.startswith(mark):
            return io.BufferedReader(_Transcoded(stream, encoding), _INPUT), encoding.upper()
    return stream, None


class _Transcoded(io.RawIOBase):
    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(_UNDECODABLE)
        self._ready = memoryview(b"")
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            block = self._stream.read(_INPUT)
            self._ended = not block
            text = self._decoder.decode(block, final=self._ended)
            self._ready = memoryview(text.encode("utf-8", "surrogateescape"))
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


class TarStream:
    """A tar as `tarfile` streams it: bounded while headers are read, and able to go back a little.

    Attributes:
        length: bytes handed out, less those taken back.
        limit: `read` refuses to go beyond this byte; None while a member's own bytes are read.
    """

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream, self._name = stream, name
        self._last, self._returned = b"", b""
        self.length = 0
        self.limit: int | None = None

    def read(self, size: int) -> bytes:
        if self._returned:
            block, self._returned = self._returned[:size], self._returned[size:]
        else:
            block = self._stream.read(size)
        self.length += len(block)
        if self.limit is not None and self.length > self.limit:
            raise UserError(f"{self._name}: a header of more than 1 MiB near byte {self.limit}; pack it anew")
        self._last = block
        return block

    def back_to(self, position: int) -> bool:
        """Whether the next read will start at ``position``: it must lie in what was read last."""
        start = self.length - len(self._last)
        if not start <= position <= self.length:
            return False
        self._returned = self._last[position - start :] + self._returned
        self._last, self.length = self._last[: position - start], position
        return True

    def skip_zeros(self) -> bool:
        """Read on to the next byte that is not zero, and stand before its block; False at the end."""
        start = self.length
        while block := self.read(_BLOCK):
            content = block.lstrip(b"\0")
            if content:
                found = self.length - len(content)
                return self.back_to(found - (found - start) % tarfile.BLOCKSIZE) or self._lost()
        return False

    def _lost(self) -> bool:
        raise tarfile.ReadError(f"no member header at byte {self.length}")
