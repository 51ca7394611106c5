"""Every format gives the same documents; every truncation is an error."""

from __future__ import annotations

import gzip
import io
import re
import zipfile

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from data_prep.readers.formats import ReadOptions, read_documents, supported
from dualroute.errors import UserError
from tests.data_prep import samples
from tests.data_prep.samples import jsonl, read, tar, written

TEXTS = [f"Text {n}: naïve\n\tline\n" + "abc def " * (40 * n) for n in range(20)]
COMPRESS = {"": bytes, **samples.COMPRESS}


@pytest.mark.parametrize("ending", COMPRESS)
def test_text(tmp_path, ending):
    path = written(tmp_path, f"a.txt{ending}", COMPRESS[ending](TEXTS[3].encode()))
    assert [(d.name, d.text) for d in read(path)] == [(path.name, TEXTS[3])]


@pytest.mark.parametrize("ending", COMPRESS)
def test_jsonl(tmp_path, ending):
    path = written(tmp_path, f"a.jsonl{ending}", COMPRESS[ending](jsonl(TEXTS, "body")))
    documents = read(path, text_key="body")
    assert [d.text for d in documents] == TEXTS
    assert documents[4].name == f"{path.name}:5"


@pytest.mark.parametrize("ending", COMPRESS)
def test_tar(tmp_path, ending):
    members = {f"x/{n:02d}.txt": t.encode() for n, t in enumerate(TEXTS)}
    members |= {
        "x/picture.png": b"\x89PNG",
        "x/.hidden.txt": b"no",
        "more.jsonl.gz": gzip.compress(jsonl(TEXTS)),
    }
    path = written(tmp_path, f"a.tar{ending}", COMPRESS[ending](tar(members)))
    documents = read(path)
    assert [d.text for d in documents] == TEXTS + TEXTS
    assert documents[0].name == f"{path.name}!x/00.txt"
    assert documents[-1].name == f"{path.name}!more.jsonl.gz:20"


def test_tgz_is_a_tar(tmp_path):
    path = written(tmp_path, "a.tgz", gzip.compress(tar({"a.txt": b"text"})))
    assert [d.text for d in read(path)] == ["text"]


def test_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dir/a.txt", TEXTS[1])
        archive.writestr("dir/b.bin", b"\0")
    assert [(d.name, d.text) for d in read(tmp_path / "a.zip")] == [("a.zip!dir/a.txt", TEXTS[1])]


def test_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"n": range(20), "text": TEXTS}), tmp_path / "a.parquet")
    assert [d.text for d in read(tmp_path / "a.parquet")] == TEXTS
    with pytest.raises(UserError, match=r"a\.parquet: no column 'body' \(there are: n, text\); set text_key"):
        read(tmp_path / "a.parquet", text_key="body")


def test_zstd_of_several_frames(tmp_path):
    compress = COMPRESS[".zst"]
    data = compress(jsonl(TEXTS[:7])) + compress(b"") + compress(jsonl(TEXTS[7:]))
    assert [d.text for d in read(written(tmp_path, "a.jsonl.zst", data))] == TEXTS


@pytest.mark.parametrize("ending", [".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_compression_is_an_error(tmp_path, ending, share):
    data = COMPRESS[ending](jsonl(TEXTS))
    path = written(tmp_path, f"a.jsonl{ending}", data[: int(len(data) * share)])
    with pytest.raises(UserError, match=rf"a\.jsonl{re.escape(ending)}: the file is damaged or cut off"):
        read(path)


def test_a_tar_is_an_error_wherever_it_is_cut(tmp_path):
    """Python's tarfile takes several of these for the end of the archive."""
    data = tar({f"{n}.txt": t.encode() for n, t in enumerate(TEXTS[:3])})
    content = len(data.rstrip(b"\0"))
    for length in range(1, content + 1, 256):
        with pytest.raises(UserError, match=r"a\.tar: the file is damaged or cut off"):
            read(written(tmp_path, "a.tar", data[:length]))


def test_a_damaged_header_inside_a_tar_is_an_error(tmp_path):
    data = bytearray(tar({"0.txt": b"first", "1.txt": b"second", "2.txt": b"third"}))
    data[1024 + 100] ^= 0xFF  # the second member's header
    with pytest.raises(UserError, match=r"damaged or cut off \(unreadable member header at byte 1024\)"):
        read(written(tmp_path, "a.tar", bytes(data)))


def test_damaged_zip_and_parquet(tmp_path):
    for name in ("a.zip", "a.parquet"):
        with pytest.raises(UserError, match=f"{name}: the file is damaged or cut off"):
            read(written(tmp_path, name, b"PAR1 not really"))


@pytest.mark.parametrize("ending", [".zip", ".parquet", ".arrow"])
@pytest.mark.parametrize("around", [".tar", ".gz", ".zst"])
def test_what_needs_random_access_is_copied_out_of_a_stream(tmp_path, ending, around):
    table = pyarrow.table({"text": TEXTS})
    data = io.BytesIO()
    if ending == ".zip":
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr("a.jsonl", jsonl(TEXTS))
    elif ending == ".parquet":
        pyarrow.parquet.write_table(table, data)
    else:
        with pyarrow.ipc.new_file(data, table.schema) as writer:
            writer.write_table(table)
    inner = data.getvalue()
    whole = tar({f"x{ending}": inner}) if around == ".tar" else COMPRESS[around](inner)
    name = "a.tar" if around == ".tar" else f"a{ending}{around}"
    assert [d.text for d in read(written(tmp_path, name, whole))] == TEXTS


BAD = b"good line\nbad \xff byte\n"


def test_undecodable_text_names_file_and_byte(tmp_path):
    path = written(tmp_path, "a.txt", BAD)
    with pytest.raises(UserError, match=r"a\.txt: byte 14 \(0xff\) is not UTF-8"):
        read(path)
    path = written(tmp_path, "a.tar", tar({"ok.txt": b"ok", "bad.txt": BAD}))
    with pytest.raises(UserError, match=r"a\.tar!bad\.txt: byte 14 "):
        read(path)


def test_the_byte_counts_from_the_start_of_the_file(tmp_path):
    lines = jsonl(["first", "second"])
    path = written(tmp_path, "a.jsonl", lines + b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match=f"byte {len(lines) + 10} "):
        read(path)
    path = written(tmp_path, "b.txt", b"one|two|th\xffree")
    with pytest.raises(UserError, match="byte 10 "):
        read(path, separator="|")


def test_undecodable_text_can_be_replaced_or_skipped(tmp_path):
    path = written(tmp_path, "a.tar", tar({"ok.txt": b"ok", "bad.txt": BAD}))
    options = ReadOptions(on_decode_error="replace")
    assert [d.text for d in read_documents(path, "a.tar", options)] == ["ok", "good line\nbad \ufffd byte\n"]
    assert options.dropped == {"repaired (kept)": 1}
    options = ReadOptions(on_decode_error="skip")
    assert [d.text for d in read_documents(path, "a.tar", options)] == ["ok"]
    assert options.dropped == {"undecodable": 1}


def test_lone_surrogates_of_json_are_undecodable_too(tmp_path):
    path = written(tmp_path, "a.jsonl", b'{"text": "fine \\ud83d\\ude00"}\n{"text": "a \\ud800 b"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: character 2 is a lone surrogate"):
        read(path)
    assert [d.text for d in read(path, on_decode_error="replace")] == ["fine \U0001f600", "a \ufffd b"]
    assert [d.text for d in read(path, on_decode_error="skip")] == ["fine \U0001f600"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", r"a\.jsonl:2: not JSON"),
        (b'{"body": "x"}', r"a\.jsonl:2: no key 'text' \(there is: body\); set text_key"),
        (b'["text"]', r"a\.jsonl:2: no key 'text' \(there is: list\)"),
        (b'{"text": 5}', r"a\.jsonl:2: 'text' is int, not text"),
    ],
)
def test_bad_records_name_the_line(tmp_path, line, message):
    path = written(tmp_path, "a.jsonl", b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        read(path)


def test_null_texts_and_blank_lines_are_no_documents(tmp_path):
    path = written(tmp_path, "a.jsonl", b'\n{"text": null}\n\n{"text": "x"}')
    options = ReadOptions()
    assert [d.text for d in read_documents(path, "a.jsonl", options)] == ["x"]
    assert options.dropped == {"empty": 1}


@pytest.mark.parametrize("mark", ["|", "<|endoftext|>", "\n\n"])
def test_a_separator_cuts_across_blocks(tmp_path, mark, monkeypatch):
    monkeypatch.setattr("data_prep.readers.formats._BLOCK", 7)  # marks fall on the edges of blocks
    texts = [f"part {n} " + "é" * n for n in range(30)]
    path = written(tmp_path, "a.txt", mark.join(texts).encode())
    documents = read(path, separator=mark)
    assert [d.text for d in documents] == texts
    assert documents[2].name == "a.txt:3"


def test_headings_start_documents(tmp_path):
    text = "\n = First = \n\n one \n = = Section = = \n two \n = Second = \n three \n"
    path = written(tmp_path, "wiki.raw", text.encode())
    documents = read(path, heading=re.compile(r" = [^=].*[^=] = "))
    assert "".join(d.text for d in documents) == text
    assert [d.name for d in documents] == ["wiki.raw", "wiki.raw:First", "wiki.raw:Second"]


def test_the_byte_order_mark_goes(tmp_path):
    assert read(written(tmp_path, "a.txt", b"\xef\xbb\xbftext"))[0].text == "text"
    assert read(written(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "x"}'))[0].text == "x"


def test_an_endless_document_is_refused(tmp_path):
    path = written(tmp_path, "a.txt", b"word " * 500_000)
    with pytest.raises(UserError, match=r"more than 1 MB; set separator .*, or raise max_document_mb"):
        read(path, max_document_bytes=1_000_000)
    assert len(read(path, separator="word " * 100, max_document_bytes=1_000_000)) == 5000


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(UserError, match=r"no\.txt: no such file"):
        read(tmp_path / "no.txt")
    with pytest.raises(UserError, match=r"a\.png: unknown kind of file; known are \.txt"):
        read(written(tmp_path, "a.png", b""))
    assert supported("A.TXT.GZ")
    assert not supported("a.gz")
