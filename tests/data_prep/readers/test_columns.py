"""Parquet and Arrow: every spelling of text, and what no text is."""

from __future__ import annotations

import io

import pyarrow
import pyarrow.ipc
import pytest

from data_prep.readers.documents import ReadOptions
from dualroute.errors import UserError
from tests.data_prep.samples import TEXTS, arrow, parquet, read, texts_of, written

BYTES = [text.encode() for text in TEXTS]
COLUMNS = {
    "string": pyarrow.array(TEXTS),
    "large": pyarrow.array(TEXTS, pyarrow.large_string()),
    "binary": pyarrow.array(BYTES),
    "large-binary": pyarrow.array(BYTES, pyarrow.large_binary()),
    "dictionary": pyarrow.array(TEXTS).dictionary_encode(),
    "view": pyarrow.array(TEXTS, pyarrow.string_view()),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_type_of_text(tmp_path, kind):
    column = COLUMNS[kind]
    if kind != "view":
        assert texts_of(written(tmp_path, "a.parquet", parquet(column))) == TEXTS
    assert texts_of(written(tmp_path, "a.arrow", arrow(column))) == TEXTS
    assert texts_of(written(tmp_path, "a.feather", arrow(column, compression="zstd"))) == TEXTS
    documents = read(written(tmp_path, "b.arrow", arrow(column, stream=True)))
    assert [document.text for document in documents] == TEXTS
    assert [document.name for document in documents[:2]] == ["b.arrow:1", "b.arrow:2"]


def not_utf8(kind: type = pyarrow.StringArray) -> pyarrow.Array:
    """A string column that says so of bytes that are none."""
    column = pyarrow.array([b"good", b"bad \xff", None, b"nul \0 is text in a record"])
    return kind.from_buffers(len(column), *column.buffers()[1:], column.buffers()[0], column.null_count)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_strings_that_are_not_utf8_meet_on_decode_error(tmp_path, name):
    path = written(tmp_path, name, (parquet if name == "a.parquet" else arrow)(not_utf8()))
    with pytest.raises(UserError, match=rf"{name}:2: byte 4 \(0xff\) is not UTF-8"):
        read(path)
    options = ReadOptions(on_decode_error="replace")
    texts = ["good", "bad \ufffd", "nul \0 is text in a record"]
    assert [document.text for document in read(path, options)] == texts
    assert options.dropped == {"repaired (kept)": 1, "empty": 1}
    assert texts_of(path, on_decode_error="skip") == [texts[0], texts[2]]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "s.arrow"])
def test_a_column_that_is_no_text_and_one_that_is_missing(tmp_path, name):
    data = {"a.parquet": parquet(), "a.arrow": arrow(), "s.arrow": arrow(stream=True)}[name]
    path = written(tmp_path, name, data)
    with pytest.raises(UserError, match=rf"{name}: 'n' is int64, not text; set text_key"):
        read(path, text_key="n")
    with pytest.raises(UserError, match=rf"{name}: no column 'body' \(there are: n, text\); set text_key"):
        read(path, text_key="body")


def test_streams_one_after_another(tmp_path):
    data = arrow(pyarrow.array(TEXTS[:7]), stream=True) + arrow(pyarrow.array(TEXTS[7:]), stream=True)
    assert texts_of(written(tmp_path, "a.arrow", data)) == TEXTS


def test_a_stream_is_an_error_wherever_it_is_cut(tmp_path):
    """The library takes one that was cut between two batches for a whole one."""
    data = arrow(pyarrow.array(["first", "second", "third"]), stream=True, rows=1)
    for length in range(0, len(data), 8):
        with pytest.raises(UserError, match=r"a\.arrow: the file is damaged or cut off"):
            read(written(tmp_path, "a.arrow", data[:length]))


def test_feather_version_1_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.feather: Feather version 1"):
        read(written(tmp_path, "a.feather", b"FEA1" + b"\0" * 100))


def test_a_text_longer_than_the_limit(tmp_path):
    column = pyarrow.array(["short", "long " * 1000])
    for name, data in (("a.parquet", parquet(column)), ("a.arrow", arrow(column))):
        with pytest.raises(UserError, match=rf"{name}:2: a document of more than 0\.001 MB"):
            read(written(tmp_path, name, data), max_document_bytes=1000)


def test_long_rows_are_read_a_few_at_a_time(tmp_path):
    """60 rows of 1.5 MB: batches of rows by number alone would hold them all, 90 MB."""
    table = pyarrow.table({"text": [f"{n} " + "word " * 300_000 for n in range(60)]})
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table, stream, use_dictionary=False, write_batch_size=1)
    del table
    path = written(tmp_path, "a.parquet", stream.getvalue())
    before = pyarrow.total_allocated_bytes()
    pool = pyarrow.default_memory_pool()
    from data_prep.readers.formats import read_documents

    most = 0
    for document in read_documents(path, "a.parquet", ReadOptions()):
        most = max(most, pool.bytes_allocated() - before)
        assert len(document.text) > 1_500_000
    assert 20e6 < most < 50e6


def test_a_long_text_in_every_row_is_unpacked_a_few_times_at_once(tmp_path):
    """A dictionary makes 200 MB of 5 kB."""
    from data_prep.readers.formats import read_documents

    path = written(tmp_path, "a.parquet", parquet(pyarrow.array(["x" * 100_000] * 2000)))
    assert path.stat().st_size < 50_000
    before, most = pyarrow.total_allocated_bytes(), 0
    for _ in read_documents(path, "a.parquet", ReadOptions()):
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 30e6


def test_columns_without_rows_and_of_nothing(tmp_path):
    options = ReadOptions()
    for name, data in (
        ("a.parquet", parquet(pyarrow.array([], pyarrow.string()))),
        ("a.arrow", arrow(pyarrow.array([], pyarrow.string()))),
        ("s.arrow", arrow(pyarrow.nulls(3), stream=True)),
    ):
        assert read(written(tmp_path, name, data), options) == []
    assert options.files.skipped["without a document"].count == 3
    assert options.dropped == {"empty": 3}
