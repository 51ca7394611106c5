"""Compressed streams that tell when they were cut off.

Comes in: an open file and the ending of its name. Goes out: the stream inside, to `formats`.

The zstandard library's own reader takes a frame that ends too early for the end of the
file, so this module feeds the decoder itself.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from typing import IO, cast

import zstandard

COMPRESSION_ENDINGS = (".gz", ".xz", ".bz2", ".zst")
_BLOCK = 1 << 20

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


def decompress(stream: IO[bytes], ending: str) -> IO[bytes]:
    """The stream inside a compression; reading it raises one of `DAMAGE` if it is cut off."""
    if ending == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    if ending == ".xz":
        return lzma.LZMAFile(stream)
    if ending == ".bz2":
        return bz2.BZ2File(stream)
    return io.BufferedReader(_ZstdReader(stream), _BLOCK)


class _ZstdReader(io.RawIOBase):
    """zstd frames, one after another; unlike the library's reader it reports a frame that is cut off."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decoder = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False  # some of a frame has been fed, its end has not been seen
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            block = (self._decoder.unused_data if self._decoder.eof else b"") or self._stream.read(1 << 16)
            if not block:
                if self._inside:
                    raise EOFError("the zstd stream ends inside a frame")
                return 0
            if self._decoder.eof:
                self._decoder = zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._decoder.decompress(block)
            self._inside = not self._decoder.eof
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


class WatchedStream:
    """Counts what passes, and remembers where the last byte that is not zero was: a tar ends in zeros."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.length = 0
        self.content_end = 0

    def read(self, size: int) -> bytes:
        block = self._stream.read(size)
        content = len(block.rstrip(b"\0"))
        if content:
            self.content_end = self.length + content
        self.length += len(block)
        return block
