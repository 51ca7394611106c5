"""Columnar files to documents: Parquet, and Arrow as a file, a stream or Feather.

Only the column of the text is read, in batches of a bounded size, as bytes: libraries that write these files
need not check that a string is UTF-8. What a damaged file says of places in memory is validated before use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from data_prep.readers.documents import Document, ReadOptions, decode, document_of, too_long
from data_prep.readers.streams import DamagedStream, random_access
from data_prep.tally import readable
from dualroute.errors import UserError

_BATCH_BYTES = 1 << 25
_MAX_BATCH_ROWS = 64  # a long text that stands in every row takes no room in the file
_SLICE = 256
_REMEDY = "set text_key, or leave the file out with exclude"
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
_ARROW_MARK, _FEATHER_MARK = b"ARROW1", b"FEA1"
_CONTINUES = b"\xff\xff\xff\xff"  # before every message of a stream, since Arrow 0.15
_NO_MORE = b"\0\0\0\0"  # the length of the message after the last


def read_parquet(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[Document]:
    """The column ``text_key``, row group after row group."""
    import pyarrow.parquet

    stream = random_access(stream, name)

    def batches() -> Iterator[Any]:
        table = pyarrow.parquet.ParquetFile(stream)
        rows = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // _bytes_per_row(table.metadata)))
        for column in _chosen(table.schema_arrow, name, options):
            for batch in table.iter_batches(batch_size=rows, columns=[table.schema_arrow.names[column]]):
                yield batch.column(0)

    yield from _documents(batches(), name, options)


def _bytes_per_row(metadata: Any) -> int:
    """The most that a row takes in the mean of a row group, all columns together."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    return max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=1) or 1


def read_arrow(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[Document]:
    """The column ``text_key`` of an IPC file (Feather version 2 is one), or of an IPC stream."""
    import pyarrow.ipc

    stream = random_access(stream, name)
    head = stream.read(len(_ARROW_MARK))
    stream.seek(0)
    if head.startswith(_FEATHER_MARK):
        raise UserError(f"{name}: Feather version 1, which is no longer read; write it anew as version 2")

    def of_file() -> Iterator[Any]:
        reader = pyarrow.ipc.open_file(stream)
        columns = _chosen(reader.schema, name, options)
        for number in range(reader.num_record_batches):
            yield from (reader.get_batch(number).column(column) for column in columns)

    def of_streams() -> Iterator[Any]:
        """One stream after another; the library takes a stream without its end mark for a whole one."""
        while True:
            start = stream.tell()
            mark = _CONTINUES + _NO_MORE if stream.read(4) == _CONTINUES else _NO_MORE
            stream.seek(start)
            reader = pyarrow.ipc.open_stream(stream)
            columns = _chosen(reader.schema, name, options)
            for batch in reader:
                yield from (batch.column(column) for column in columns)
            end = stream.tell()
            stream.seek(max(start, end - len(mark)))
            if stream.read(len(mark)) != mark:
                raise DamagedStream("the mark of the stream's end is missing")
            if not stream.read(1):
                return
            stream.seek(end)

    yield from _documents(of_file() if head == _ARROW_MARK else of_streams(), name, options)


def _chosen(schema: Any, name: str, options: ReadOptions) -> list[int]:
    """Places of the columns that are read: the one of the text, or every one that holds texts."""
    if options.all_text:
        return [place for place, column in enumerate(schema) if str(column.type) in _TEXT_TYPES]
    return [_named(schema.names, name, options)]


def _named(names: list[str], name: str, options: ReadOptions) -> int:
    if options.text_key in names:
        return names.index(options.text_key)
    listed = ", ".join(readable(column)[:40] for column in names[:10]) + (", …" if len(names) > 10 else "")
    raise UserError(f"{name}: no column {options.text_key!r} (there are: {listed}); {_REMEDY}")


def _documents(columns: Iterator[Any], name: str, options: ReadOptions) -> Iterator[Document]:
    number = 0
    while True:
        try:
            column = next(columns, None)
            if column is None:
                return
            column = _as_bytes(column, name, options)
        except (UserError, DamagedStream):
            raise
        except Exception as error:  # a damaged file makes pyarrow raise ArrowException, OSError, TypeError, …
            raise DamagedStream(readable(error)[:200] or type(error).__name__) from error
        for start in range(0, len(column), _SLICE):
            for value in column.slice(start, _SLICE):
                number += 1
                yield from _document(value, f"{name}:{number}", options)


def _as_bytes(column: Any, name: str, options: ReadOptions) -> Any:
    """The column as binary, its offsets checked; one of chats as the lists that it holds."""
    import pyarrow

    kind = column.type
    if options.chats and (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
        column.validate(full=True)
        return column
    if pyarrow.types.is_dictionary(kind) and str(kind.value_type) in _TEXT_TYPES:
        column.indices.validate(full=True)
        values = _as_bytes(column.dictionary, name, options)
        column = pyarrow.DictionaryArray.from_arrays(column.indices, values)
        column.validate(full=True)
        return column
    if pyarrow.types.is_null(kind):
        return column
    if str(kind) not in _TEXT_TYPES:
        raise UserError(f"{name}: {options.text_key!r} is {kind}, not text; {_REMEDY}")
    if str(kind) == "string":
        column = column.cast(pyarrow.binary())
    elif str(kind) == "large_string":
        column = column.cast(pyarrow.large_binary())
    elif str(kind) == "string_view":
        column = column.cast(pyarrow.binary_view())
    column.validate(full=True)
    return column


def _document(value: Any, where: str, options: ReadOptions) -> Iterator[Document]:
    data = value.as_py()
    if data is None:
        yield from document_of(None, where, options)
        return
    if isinstance(data, list):
        yield from document_of(data, where, options)
        return
    if len(data) > options.max_document_bytes:
        raise too_long(where, "a document", options)
    text = decode(data, where, 0, options, nul_is_text=True)
    if text is not None:
        yield Document(where, text)
