"""JSON Lines, JSON, CSV and TSV: the same texts, and one line for what is wrong."""

from __future__ import annotations

import gzip
import io
import json
import zlib

import pytest

from data_prep.readers.documents import NoTextKey, ReadOptions
from dualroute.errors import UserError
from tests.data_prep.samples import TEXTS, read, texts_of, written

OBJECTS = [{"n": n, "text": text} for n, text in enumerate(TEXTS)]


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(OBJECTS),
        json.dumps(OBJECTS, indent=2),
        json.dumps({"version": "1", "data": OBJECTS}),
        json.dumps({"version": "1", "data": OBJECTS}, indent=2, ensure_ascii=False),
        "\n\n" + "\n\n".join(map(json.dumps, OBJECTS)) + "\n",
    ],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_json_of_every_shape(tmp_path, data, compress):
    name = "a.json" + (".gz" if compress is gzip.compress else "")
    documents = read(written(tmp_path, name, compress(data.encode())))
    assert [document.text for document in documents] == TEXTS
    assert documents[0].name.startswith(f"{name}:")
    assert len({document.name for document in documents}) == len(TEXTS)


def test_a_json_object_is_a_document(tmp_path):
    data = json.dumps({"text": "one", "data": [1]}, indent=1).encode()
    assert [(d.name, d.text) for d in read(written(tmp_path, "a.json", data))] == [("a.json", "one")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"title": "x", "body": "y"}', r"a\.json: no key 'text' \(there is: body, title\); set text_key"),
        (b"[[1]]", r"a\.json:1: no key 'text' \(there is: list\)"),
        (b'"text"', r"a\.json: no key 'text' \(there is: str\)"),
        (b'{"a": "x"}\n{"a": "y"}\n', r"a\.json:1: no key 'text' \(there is: a\)"),
    ],
)
def test_json_that_is_no_corpus_says_what_there_is(tmp_path, data, message):
    with pytest.raises(NoTextKey, match=message):
        read(written(tmp_path, "a.json", data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"text": "x"}, {"body": "y"}]', r"a\.json:2: no key 'text' \(there is: body\)"),
        (b'[{"text": "x"}, {"text": ["y"]}]', r"a\.json:2: 'text' is list, not text"),
        (b'[{"text": "x"}', r"a\.json: not JSON \(.*\); mend it, or leave it out with exclude"),
        (b'{"text": "x"}\n{"text": ', r"a\.json:2: not JSON"),
        (b"[" * 200_000, r"a\.json: lists or objects nested too deeply"),
        (b'{"text": "x"}\n' + b"[" * 200_000, r"a\.json:2: lists or objects nested too deeply"),
    ],
)
def test_damage_after_a_good_start_is_an_error(tmp_path, data, message):
    with pytest.raises(UserError, match=message) as error:
        read(written(tmp_path, "a.json", data))
    assert not isinstance(error.value, NoTextKey)
    assert "\n" not in str(error.value)


def test_deeply_nested_json_lines_are_an_error(tmp_path):
    line = b'{"text": "x", "more": ' + b'{"a":' * 100_000
    with pytest.raises(UserError, match=r"a\.jsonl:2: lists or objects nested too deeply"):
        read(written(tmp_path, "a.jsonl", b'{"text": "x"}\n' + line))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"])
def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, name):
    """Some kilobytes of gzip hold 64 MB of one line; 5 MB of it is too much already."""
    packer = zlib.compressobj(9, wbits=31)
    start = b'{"text": "' if "json" in name else b'id,text\n1,"' if "csv" in name else b"id\ttext\n1\t"
    data = packer.compress(start) + b"".join(packer.compress(b"a" * (1 << 20)) for _ in range(64))
    path = written(tmp_path, f"{name}.gz", data + packer.flush())
    assert path.stat().st_size < 500_000
    with pytest.raises(UserError, match=rf"{name}\.gz.*more than 5 MB.*raise max_document_mb"):
        read(path, max_document_bytes=5_000_000)


def test_a_json_value_longer_than_the_limit_is_refused(tmp_path):
    path = written(tmp_path, "a.json", json.dumps(OBJECTS, indent=1).encode())
    with pytest.raises(UserError, match=r"a\.json: a JSON value of more than 0\.001 MB"):
        read(path, max_document_bytes=1000)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_of_millions_of_values_is_refused_before_it_fills_the_memory(tmp_path, name, monkeypatch):
    """``[],`` takes three bytes in the file and about 64 in memory."""
    monkeypatch.setattr("data_prep.readers.records._MAX_VALUES", 1000)
    assert len(read(written(tmp_path, name, b'{"text": "' + b"many words " * 500 + b'"}'))) == 1
    path = written(tmp_path, name, b'{"text": "x", "more": [' + b"[]," * 1000 + b"0]}")
    with pytest.raises(UserError, match=rf"{name}.*: JSON of more than 1,000 lists, objects and values"):
        read(path)


def test_csv_with_quoted_line_breaks_and_long_fields(tmp_path):
    long = "word, " * 60_000  # the csv module's own limit is 131,072 characters
    texts = ['say "hi",\r\nthen\n\n go', "plain", long]
    lines = ["id,text,more", *(f'{n},"{t.replace(chr(34), chr(34) * 2)}",x' for n, t in enumerate(texts))]
    assert texts_of(written(tmp_path, "a.csv", ("\ufeff" + "\r\n".join(lines)).encode())) == texts


def test_tsv_knows_no_quotation_marks(tmp_path):
    data = 'id\ttext\n1\t"quoted" at first\n2\tan "open mark\n\n3\t"\n'
    assert texts_of(written(tmp_path, "a.tsv", data.encode())) == [
        '"quoted" at first',
        'an "open mark',
        '"',
    ]


def test_a_column_of_a_table_without_names_is_given_by_its_place(tmp_path):
    path = written(tmp_path, "a.tsv.gz", gzip.compress(b"gj04\t1\tfirst\ngj04\t0\tsecond\n"))
    assert texts_of(path, text_key="3") == ["first", "second"]
    with pytest.raises(NoTextKey, match=r"a\.tsv\.gz:1: no column '4' \(there are: gj04, 1, first\)"):
        read(path, text_key="4")
    named = written(tmp_path, "b.csv", b"3,2\nx,y\n")  # a column may be called so
    assert texts_of(named, text_key="3") == ["x"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"id,text\n1,x\n2,y,z\n", r"a\.csv:3: 3 columns, where line 1 has 2"),
        ("a.tsv", b"id\ttext\n1\n", r"a\.tsv:2: 1 columns, where line 1 has 2"),
        ("a.csv", b'id,text\n1,"x"y\n', r"a\.csv:2: not CSV"),
        ("a.csv", b'id,text\n1,"never closed\n', r"a\.csv:2: not CSV \(unexpected end of data\)"),
        ("a.csv", b"id,body\n1,x\n", r"a\.csv:1: no column 'text' \(there are: id, body\); set text_key"),
        ("a.csv", b"id,text\n1,\xe9\n", r"a\.csv: byte 10 \(0xe9\) is not UTF-8"),
        ("a.csv", b"id,text\n1,\0\n", r"a\.csv: byte 10 is NUL"),
    ],
)
def test_bad_tables_name_the_line(tmp_path, name, data, message):
    with pytest.raises(UserError, match=message):
        read(written(tmp_path, name, data))


def test_a_bad_byte_in_a_table_costs_its_record_and_no_other(tmp_path):
    path = written(tmp_path, "a.csv", b'id,text\n1,good\n2,"bad \xe9\nsecond line"\n3,"also\ngood"\n')
    options = ReadOptions(on_decode_error="skip")
    assert [d.text for d in read(path, options)] == ["good", "also\ngood"]
    assert options.dropped == {"undecodable": 1}
    options = ReadOptions(on_decode_error="replace")
    assert [d.text for d in read(path, options)] == ["good", "bad \ufffd\nsecond line", "also\ngood"]
    assert options.dropped == {"repaired (kept)": 1}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-8-sig"])
def test_other_encodings_that_say_so_by_their_first_bytes(tmp_path, encoding):
    for name, text in (
        ("a.jsonl", '{"text": "naïve 中文"}\n{"text": "second"}\n'),
        ("a.json", '[{"text": "naïve 中文"},\n {"text": "second"}]'),
        ("a.csv", "id,text\n1,naïve 中文\n2,second\n"),
        ("a.tsv", "id\ttext\n1\tnaïve 中文\n2\tsecond\n"),
    ):
        mark = "\ufeff" if encoding == "utf-16-be" else ""
        path = written(tmp_path, name, (mark + text).encode(encoding))
        assert texts_of(path) == ["naïve 中文", "second"]


def test_files_of_no_record_are_counted(tmp_path):
    for name, data in (
        ("a.jsonl", b""),
        ("b.jsonl", b"\n \n"),
        ("c.json", b""),
        ("d.json", b"[]"),
        ("e.csv", b""),
        ("f.csv", b"id,text\n"),
        ("g.tsv", b"\n\n"),
        ("h.ndjson", b""),
    ):
        options = ReadOptions()
        assert read(written(tmp_path, name, data), options) == []
        assert options.files.to_json() == {
            "read": {},
            "skipped": {"without a document": {"count": 1, "examples": [name]}},
        }


def test_memory_follows_the_longest_line_and_not_the_file(tmp_path):
    import tracemalloc

    line = json.dumps({"text": "word " * 200}).encode() + b"\n"
    data = io.BytesIO()
    with gzip.open(data, "wb") as stream:
        for _ in range(5_000):
            stream.write(line)
    path = written(tmp_path, "a.json.gz", data.getvalue())
    tracemalloc.start()
    try:
        from data_prep.readers.formats import read_documents

        assert sum(1 for _ in read_documents(path, "a.json.gz", ReadOptions())) == 5_000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000  # of 5 MB
    finally:
        tracemalloc.stop()
