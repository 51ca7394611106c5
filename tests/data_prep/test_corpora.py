"""Names and paths of corpora, and the order of their files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_prep import corpora
from data_prep.corpora import REGISTRY, Corpus, SourceFile, documents, open_corpus, strip_gutenberg
from data_prep.readers.formats import ReadOptions
from dualroute.errors import UserError


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a.txt", "c.jsonl.gz", "picture.png", ".hidden/x.txt", "b/.x.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text")
    corpus = open_corpus(str(tmp_path))
    assert [source.name for source in corpus.files] == ["a.txt", "b/10.txt", "b/2.txt", "c.jsonl.gz"]
    assert corpus.name == tmp_path.name


def test_a_single_file(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    corpus = open_corpus(str(tmp_path / "a.txt"))
    assert [d.text for d in documents(corpus, ReadOptions(), tmp_path)] == ["text"]
    assert [d.name for d in documents(corpus, ReadOptions(), tmp_path)] == ["a.txt"]


def test_the_fingerprint_of_a_file_follows_its_contents(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (before,) = open_corpus(str(tmp_path / "a.txt")).files
    first = before.fingerprint()
    assert before.fingerprint() == first
    (tmp_path / "a.txt").write_text("longer text")
    assert before.fingerprint() != first


def test_the_standard_library_is_large_decodable_and_free_of_tests():
    corpus = open_corpus("stdlib")
    names = [source.name for source in corpus.files]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any("test" in Path(name).parts or "site-packages" in name for name in names)
    texts = [d.text for d in documents(corpus, ReadOptions(), Path())]
    assert len(texts) == len(names)
    assert sum(map(len, texts)) > 5_000_000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stdlb", "did you mean 'stdlib'"),
        ("WikiText", "did you mean 'wikitext-103'"),
        ("tinystory", "did you mean 'tinystories'"),
        ("no/such/folder", "no/such/folder: no such file or folder"),
        ("books.txt", "books.txt: no such file or folder"),
    ],
)
def test_unknown_names_and_missing_paths(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        open_corpus(name)
    assert "\n" not in str(error.value)
    assert "gutenberg" in str(error.value)


def test_a_folder_or_file_without_text(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no supported file \(1 unknown kind \.png .*; known are"):
        open_corpus(str(tmp_path))
    with pytest.raises(UserError, match="unknown kind of file"):
        open_corpus(str(tmp_path / "a.png"))


def test_the_registry_is_sound():
    for name, corpus in REGISTRY.items():
        assert name == corpus.name
        assert corpus.licence
        assert corpus.description
        assert len({source.name for source in corpus.files}) == len(corpus.files)
        for source in corpus.files:
            assert source.path is None
            assert all(url.startswith("https://") for url in source.urls)
            assert source.urls
            assert source.sha256 is None or re.fullmatch("[0-9a-f]{64}", source.sha256)


def test_remote_files_are_fetched_one_by_one_as_they_are_read(tmp_path, monkeypatch):
    fetched = []

    def fetch(urls: Sequence[str], destination: Path, sha256: str | None, report: object) -> Path:
        fetched.append((urls, sha256))
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_text("header\none|two|drop")
        return destination

    monkeypatch.setattr(corpora.download, "fetch", fetch)
    corpus = Corpus(
        "remote",
        tuple(SourceFile(f"{n}.txt", urls=(f"https://example.org/{n}",), sha256=str(n)) for n in range(3)),
        separator="|",
        exclude=("*.txt:3",),
        strip=lambda text: text.removeprefix("header\n"),
    )
    reading = documents(corpus, ReadOptions(separator="#"), tmp_path)
    assert fetched == []
    assert [next(reading).text for _ in range(3)] == ["one", "two", "one"]
    assert fetched == [(("https://example.org/0",), "0"), (("https://example.org/1",), "1")]
    assert (tmp_path / "remote" / "0.txt").exists()


def test_gutenbergs_own_words_are_taken_away():
    text = (
        "The Project Gutenberg eBook of X\r\n\r\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\r\n\r\n"
        "CHAPTER I\r\n*** a break ***\r\nText.\r\n\r\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\r\nLicence"
    )
    assert strip_gutenberg(text) == "CHAPTER I\r\n*** a break ***\r\nText.\n"
    assert strip_gutenberg("no marks") == "no marks\n"
