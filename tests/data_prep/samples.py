"""The same texts in every kind of file that a preparation reads."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import zstandard

from data_prep.readers.documents import Document, ReadOptions
from data_prep.readers.formats import read_documents

TEXTS = [f"Text {n}: naïve\n\tline, “quoted”\n" + "abc def " * (5 * n) for n in range(12)]


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read(path: Path, options: ReadOptions | None = None, **changes) -> list[Document]:
    return list(read_documents(path, path.name, options or ReadOptions(**changes)))


def texts_of(path: Path, **changes) -> list[str]:
    return [document.text for document in read(path, **changes)]


def tar(members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def jsonl(texts: Sequence[str] = TEXTS, key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": n, key: text}).encode() + b"\n" for n, text in enumerate(texts))


def parquet(column: pyarrow.Array | None = None, **options) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(_table(column), stream, **options)
    return stream.getvalue()


def arrow(
    column: pyarrow.Array | None = None, stream: bool = False, compression: str | None = None, rows: int = 5
) -> bytes:
    table, output = _table(column), io.BytesIO()
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(
        output, table.schema, options=options
    ) as writer:
        writer.write_table(table, max_chunksize=rows)
    return output.getvalue()


def _table(column: pyarrow.Array | None) -> pyarrow.Table:
    column = pyarrow.array(TEXTS) if column is None else column
    return pyarrow.table({"n": range(len(column)), "text": column})


def _members() -> dict[str, bytes]:
    deep = "é" * 60 + "/"
    return {deep * (n % 3) + f"x/{n:02d}.txt": text.encode() for n, text in enumerate(TEXTS)}


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def every_kind() -> dict[str, bytes]:
    """File name → bytes: `TEXTS` in every kind and compression."""
    quoted = [text.replace('"', '""') for text in TEXTS]
    files = {
        "text.txt": "\x1e".join(TEXTS).encode(),  # to be cut at the separator
        "lines.jsonl": jsonl(),
        "list.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
        "pretty.json": json.dumps({"version": 1, "data": [{"text": t} for t in TEXTS]}, indent=1).encode(),
        "lines.json": jsonl(),
        "table.csv": ("id,text\r\n" + "".join(f'{n},"{t}"\r\n' for n, t in enumerate(quoted))).encode(),
        "table.tsv": b"id\ttext\n"
        + b"".join(f"{n}\t{text}\n".encode() for n, text in enumerate(_one_line(TEXTS))),
        "pax.tar": tar(_members()),
        "gnu.tar": tar(_members(), tarfile.GNU_FORMAT),
        "webdataset.tar": tar({f"{n:02d}.json": jsonl([text]) for n, text in enumerate(TEXTS)}),
        "deflated.zip": zipped(_members()),
        "stored.zip": zipped(_members(), zipfile.ZIP_STORED),
        "bzip2.zip": zipped(_members(), zipfile.ZIP_BZIP2),
        "snappy.parquet": parquet(),
        "plain.parquet": parquet(compression="none", use_dictionary=False),
        "file.arrow": arrow(),
        "stream.arrow": arrow(stream=True, compression="zstd"),
        "dictionary.arrow": arrow(pyarrow.array(TEXTS).dictionary_encode(), stream=True),
        "lz4.feather": arrow(compression="lz4"),
    }
    for ending, compress in COMPRESS.items():
        files[f"lines.jsonl{ending}"] = compress(jsonl())
    files["pax.tar.gz"] = gzip.compress(files["pax.tar"])
    files["list.json.gz"] = gzip.compress(files["list.json"])
    return files


def _one_line(texts: Sequence[str]) -> list[str]:
    return [text.replace("\n", " ").replace("\t", " ") for text in texts]


def expected(name: str) -> list[str]:
    """What reading ``name`` of `every_kind` gives, with the separator U+001E for text."""
    return _one_line(TEXTS) if name.startswith("table.tsv") else TEXTS
