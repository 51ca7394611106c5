"""Every file of a folder is read once, or counted under a reason."""

from __future__ import annotations

import os
import socket

import pytest

from data_prep.corpora import documents, open_corpus
from data_prep.readers.documents import ReadOptions
from data_prep.readers.folder import scan
from dualroute.errors import UserError
from tests.data_prep.samples import tar, written


def found(folder, **options):
    """Names of the files to read, and the count of each reason."""
    result = scan(folder, ReadOptions(**options))
    return [name for name, _ in result.files], {
        reason: entry.count for reason, entry in result.tally.skipped.items()
    }


@pytest.fixture
def linked(tmp_path):
    """A corpus whose links lead inside, outside, in circles and nowhere."""
    inside = tmp_path / "corpus"
    for name in ("corpus/a.txt", "corpus/sub/b.txt", "corpus/.store/c.txt", "other/d.txt", "e.txt"):
        written(tmp_path, name, name.encode())
    for link, target in {
        "to-file.txt": "a.txt",
        "to-folder": "sub",
        "sub/up": "..",
        "circle.txt": "circle.txt",
        "nowhere.txt": "gone.txt",
        "from-store.txt": ".store/c.txt",
        "out.txt": "../e.txt",
        "out": "../other",
        "out-again": "../other",
    }.items():
        (inside / link).symlink_to(target)
    return inside


LEADS_OUT = "link that leads out of the corpus (follow_links true reads them)"


def test_links_are_followed_once_and_not_out_of_the_corpus(linked):
    names, skipped = found(linked)
    assert names == ["a.txt", "from-store.txt", "sub/b.txt"]
    assert skipped == {
        "hidden": 1,
        "link to what is read anyway": 3,
        "link that leads nowhere": 2,
        LEADS_OUT: 3,
    }


def test_links_out_of_the_corpus_are_followed_on_demand(linked):
    names, skipped = found(linked, follow_links=True)
    assert names == ["a.txt", "from-store.txt", "out.txt", "out/d.txt", "sub/b.txt"]
    assert skipped == {"hidden": 1, "link to what is read anyway": 4, "link that leads nowhere": 2}


def test_a_corpus_that_is_a_link_itself(linked, tmp_path):
    (tmp_path / "corpus-link").symlink_to(linked)
    assert found(tmp_path / "corpus-link") == found(linked)


def test_what_is_no_text_is_counted_by_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    for name in ("a.txt", "README", "b.png", "c.png", "d.123", "e", ".hidden", "drafts/x.txt", "f.TXT.GZ"):
        written(tmp_path, name, b"text")
    written(tmp_path, "made/preparation.json", b"{}")
    written(tmp_path, "made/train-00000.tar", tar({"a.txt": b"x"}))
    os.mkfifo("pipe.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.txt")
        names, skipped = found(tmp_path, exclude=("drafts",))
    assert names == ["README", "a.txt", "f.TXT.GZ"]
    assert skipped == {
        "unknown kind .png": 2,
        "unknown kind (other)": 1,
        "unknown kind (no ending)": 1,
        "hidden": 1,
        "pipe, socket or device": 2,
        "folder that prepare made": 1,
        "excluded": 1,
    }


def test_further_endings_are_text(tmp_path):
    for name in ("a.html", "b.HTML.gz", "c", "d.png"):
        written(tmp_path, name, b"text")
    assert found(tmp_path, text_endings=(".html", ""))[0] == ["a.html", "b.HTML.gz", "c"]


def test_names_that_are_not_utf8_are_read_under_a_readable_name(tmp_path):
    for name in (b"caf\xe9.txt", b"two\nlines.txt", b"in/\xff\xfe.txt"):
        path = os.path.join(os.fsencode(tmp_path / "corpus"), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as stream:
            stream.write(b"text " + repr(name).encode())
    corpus = open_corpus(str(tmp_path / "corpus"))
    read = {document.name: document.text for document in documents(corpus, ReadOptions(), tmp_path)}
    assert list(read) == ["caf\\xe9.txt", "in/\\xff\\xfe.txt", "two\\x0alines.txt"]
    assert read["caf\\xe9.txt"] == "text b'caf\\xe9.txt'"


def test_a_pipe_as_corpus_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"corpus .*pipe\.txt: is a named pipe, not a file"):
        open_corpus(str(tmp_path / "pipe.txt"))


def test_a_file_that_became_a_pipe_is_refused_when_its_turn_comes(tmp_path):
    written(tmp_path, "a.txt", b"text")
    corpus = open_corpus(str(tmp_path))
    (tmp_path / "a.txt").unlink()
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match="is a named pipe"):
        list(documents(corpus, ReadOptions(), tmp_path))


def test_a_table_of_something_else_is_counted_in_a_folder_and_an_error_alone(tmp_path):
    written(tmp_path, "package.json", b'{"name": "x", "version": 1}')
    written(tmp_path, "numbers.csv", b"a,b\n1,2\n")
    written(tmp_path, "list.json", b"[1, 2]")
    written(tmp_path, "good.json", b'{"text": "good"}')
    written(tmp_path, "notes.tar", tar({"1.json": b'{"text": "inside"}', "2.json": b'{"caption": "x"}'}))
    options = ReadOptions()
    assert [d.text for d in documents(open_corpus(str(tmp_path)), options, tmp_path)] == ["good", "inside"]
    entry = options.files.skipped["without the text_key 'text'"]
    assert entry.count == 4
    assert entry.examples == [
        "list.json (it has: int)",
        "notes.tar!2.json (it has: caption)",
        "numbers.csv (it has: a, b)",
        "package.json (it has: name, version)",
    ]
    for name, there in (("package.json", "name, version"), ("numbers.csv", "a, b"), ("list.json", "int")):
        with pytest.raises(UserError, match=rf"{name}.*: no .* 'text' \(there .*: {there}\); set text_key"):
            list(documents(open_corpus(str(tmp_path / name)), ReadOptions(), tmp_path))


def test_damaged_files_can_be_passed_over_whole(tmp_path):
    """The good lines of a file whose checksum is wrong are not used either."""
    import gzip

    whole = gzip.compress(b'{"text": "first"}\n{"text": "second"}\n')
    written(tmp_path, "a.jsonl.gz", whole[:-8] + b"\0" * 8)
    written(tmp_path, "b.txt", b"good")
    written(tmp_path, "c.jsonl", b'{"text": "third"}\n{broken\n')
    corpus = open_corpus(str(tmp_path))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: the file is damaged"):
        list(documents(corpus, ReadOptions(), tmp_path))
    options = ReadOptions(on_bad_file="skip")
    assert [d.text for d in documents(corpus, options, tmp_path)] == ["good"]
    entry = options.files.skipped["damaged, or not what its name says"]
    assert entry.count == 2
    assert entry.examples[1].startswith("c.jsonl:2: not JSON")
    assert dict(options.files.read) == {".txt": 1}
