"""What a preparation tells of its inputs, and the one document whose end is held out."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from pathlib import Path

import pytest

from data_prep.config import PrepareConfig, differences_between
from data_prep.prepare import prepare, summary
from dualroute.data.manifest import MANIFEST_FILE
from dualroute.errors import UserError
from tests.data_prep.conftest import story
from tests.data_prep.samples import tar, written


def strict(path: Path) -> dict:
    """JSON that any reader accepts: UTF-8 without lone surrogates."""
    value = json.loads(path.read_bytes().decode("utf-8"))
    json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


@pytest.fixture
def documentation(corpus):
    """The corpus as a folder of documentation, with all that one finds in such."""
    written(corpus, "img/logo.png", b"\x89PNG")
    written(corpus, "img/more.png", b"\x89PNG")
    written(corpus, "page.html", b"<html>")
    written(corpus, "package.json", b'{"name": "docs", "version": "1"}')
    written(corpus, "api.json.gz", gzip.compress(b'{"text": "of the api", "n": 1}'))
    written(corpus, "README", story(900).encode())
    written(corpus, "guide.rst", story(901).encode())
    written(corpus, "shards.tar", tar({"0.json": json.dumps({"text": story(902)}).encode(), "0.jpg": b"x"}))
    (corpus / "latest").symlink_to("part0")
    (corpus / "outside").symlink_to("/usr")
    with open(os.path.join(os.fsencode(corpus), b"caf\xe9.md"), "w") as stream:
        stream.write(story(903))
    return corpus


def test_all_that_is_not_read_is_counted_kept_and_shown(config, documentation, capsys):
    manifest = prepare(config(progress=True))
    files = strict(manifest.folder / MANIFEST_FILE)["preparation"]["files"]
    assert files["read"] == {".json": 2, ".md": 1, ".rst": 1, ".tar": 1, ".txt": 61}
    assert {reason: (entry["count"], entry["examples"]) for reason, entry in files["skipped"].items()} == {
        "unknown kind .png": (2, ["img/logo.png", "img/more.png"]),
        "link that leads out of the corpus (follow_links true reads them)": (1, ["outside"]),
        "link to what is read anyway": (1, ["latest"]),
        "unknown kind .html": (1, ["page.html"]),
        "unknown kind .jpg": (1, ["shards.tar!0.jpg"]),
        "without the text_key 'text'": (1, ["package.json (it has: name, version)"]),
    }
    shown = capsys.readouterr().err
    assert "read: 61 .txt, 2 .json, 1 .md, 1 .rst, 1 .tar" in shown
    assert "not read: 7 files, folders or members of archives" in shown
    assert "4 of unknown kinds: 2 .png, 1 .html, 1 .jpg" in shown
    assert sum(split.documents for split in manifest.splits.values()) == 65
    assert summary(prepare(config())) == summary(manifest)  # an old one tells it again


def test_every_file_of_a_folder_is_accounted_for(config, documentation):
    manifest = prepare(config(exclude=["*.tar"]))
    files = manifest.preparation["files"]
    there = sum(len(names) for _, _, names in os.walk(documentation)) + 2  # and two links to folders
    told = sum(files["read"].values()) + sum(entry["count"] for entry in files["skipped"].values())
    assert told == there


def test_names_that_are_not_utf8_stay_valid_json_everywhere(config, documentation):
    folder = prepare(config()).folder
    assert "caf\\xe9.md" in {name for name, *_ in strict(folder / "preparation.json")["inputs"]}
    sources = set()
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    sources.add(json.loads(archive.extractfile(member).read())["source"])
    assert "caf\\xe9.md" in sources
    manifest = prepare(config(output=str(folder) + "2", val_fraction=None, val_documents=["caf*"]))
    assert manifest.split("val").documents == 1


def test_a_corpus_without_the_text_key_names_what_there_is(config, tmp_path):
    written(tmp_path, "c/a.json", b'{"title": "x", "body": "y"}')
    written(tmp_path, "c/b.csv", b"id,body\n1,x\n")
    message = r"no document to use \(2 without the text_key 'text' \(like a\.json \(it has: body, title\)\)\)"
    with pytest.raises(UserError, match=message) as error:
        prepare(config(corpus=str(tmp_path / "c")))
    assert "\n" not in str(error.value)
    assert not Path(config().output).exists()
    for name, there in (("a.json", "body, title"), ("b.csv", "id, body")):
        with pytest.raises(UserError, match=rf"{name}.*: {there}\); set text_key"):
            prepare(config(corpus=str(tmp_path / "c" / name)))


def test_the_output_may_lie_in_the_corpus(config, corpus):
    output = str(corpus / "prepared")
    first = prepare(config(output=output))
    assert prepare(config(output=output)) == first
    other = prepare(config(output=str(corpus / "again"), seed=3))
    assert other.preparation["files"]["skipped"]["folder that prepare made"]["examples"] == ["prepared"]


# one document


@pytest.fixture
def book(tmp_path):
    return written(tmp_path, "book.txt", "\n\n".join(story(n) for n in range(60)).encode())


def test_the_end_of_the_only_document_is_held_out(config, book, capsys):
    manifest = prepare(config(corpus=str(book), val_fraction=0.1, progress=True))
    train, val = manifest.split("train"), manifest.split("val")
    assert (train.documents, val.documents) == (1, 1)
    assert train.bytes + val.bytes == book.stat().st_size
    assert 0.05 < val.bytes / book.stat().st_size < 0.15
    assert "there is one document: its end is held out as val" in capsys.readouterr().err
    with tarfile.open(manifest.folder / "val-00000.tar") as archive:
        about = json.loads(archive.extractfile("00000_0000000.json").read())
    assert about["source"] == "book.txt#tail"
    assert book.read_text()[: -val.bytes].endswith("\n\n")  # the border of a paragraph
    again = prepare(config(corpus=str(book), val_fraction=0.1, output=str(book) + "-again"))
    assert again.fingerprint == manifest.fingerprint


def test_the_default_share_of_one_file_is_held_out_too(config, book):
    manifest = prepare(config(corpus=str(book), val_fraction=None))
    assert 0.01 < manifest.split("val").bytes / book.stat().st_size < 0.03


def test_an_interrupted_preparation_of_one_document_goes_on(config, book, monkeypatch):
    options = {"corpus": str(book), "val_fraction": 0.1}
    whole = prepare(config(**options, output=str(book) + "-whole"))
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.prepare.write_index", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(config(**options))
    assert prepare(config(**options)).fingerprint == whole.fingerprint


def test_one_document_of_one_letter_has_no_end_to_hold_out(config, tmp_path):
    path = written(tmp_path, "a.txt", b"x")
    with pytest.raises(UserError, match=r"holds out (none|all) of its 1 documents"):
        prepare(config(corpus=str(path)))


# options


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (r"\n\n", "\n\n"),
        ("\n\n", "\n\n"),
        (r"\t|\r\n", "\t|\r\n"),
        (r"C:\\new", "C:\\new"),
        (r"\d", r"\d"),
        ("<|endoftext|>", "<|endoftext|>"),
    ],
)
def test_a_separator_may_be_spelled_with_escapes(given, meant):
    assert PrepareConfig(separator=given).document_separator == meant


def test_a_separator_cuts_and_its_spelling_is_no_other_option(config, book):
    first = prepare(config(corpus=str(book), separator=r"\n\n"))
    assert sum(split.documents for split in first.splits.values()) > 60
    assert prepare(config(corpus=str(book), separator="\n\n")) == first


def test_an_option_that_an_earlier_version_did_not_know_is_no_difference(config):
    manifest = prepare(config())
    plan = strict(manifest.folder / "preparation.json")
    for key in ("on_bad_file", "follow_links", "max_document_mb", "exclude", "text_endings"):
        del plan["options"][key]
    (manifest.folder / "preparation.json").write_text(json.dumps(plan))
    assert prepare(config()) == manifest
    with pytest.raises(UserError, match=r"options \(follow_links False, now True\)"):
        prepare(config(follow_links=True))
    assert differences_between({"options": {}, "inputs": []}, {"options": {"seed": 0}, "inputs": []}) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"on_bad_file": "ignore"}, "on_bad_file must be one of error, skip, it is 'ignore'"),
        ({"corpus": ""}, "corpus is '', which is no path"),
        ({"output": ""}, "output is '', which is no path"),
        ({"downloads": "a\0b"}, r"downloads is 'a\\x00b', which is no path"),
        ({"tokenizer": "~nobody-of-this-name/x"}, "tokenizer ~nobody-of-this-name/x: .* in full"),
        ({"corpus": "x" * 300 + ".txt"}, r"corpus x+\.txt: cannot be read \(File name too long\)"),
        ({"max_document_mb": 0}, "max_document_mb must be positive"),
        ({"max_document_mb": float("nan")}, "max_document_mb must be positive"),
        ({"text_key": "caf\udce9"}, r"text_key: 'caf\\udce9' is not UTF-8"),
        ({"exclude": ["a", "\udcff"]}, "exclude: .* is not UTF-8"),
        ({"separator": "\udcff"}, "separator: .* is not UTF-8"),
    ],
)
def test_options_that_make_no_sense(config, change, message):
    with pytest.raises(UserError, match=message):
        prepare(config(**change))


def test_a_longer_document_is_allowed_by_name(config, book):
    with pytest.raises(UserError, match=r"book\.txt: a single document of more than 0\.01 MB"):
        prepare(config(corpus=str(book), max_document_mb=0.01))
    assert not Path(config().output).exists()
    assert prepare(config(corpus=str(book), max_document_mb=1)).split("train").documents == 1
