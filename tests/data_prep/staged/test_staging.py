"""A cleaned preparation: the same bytes whatever happens on the way, and every document accounted for."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="cleaning needs the extra prepare")
pytest.importorskip("rensa", reason="near duplicates need the extra prepare")

from data_prep import prepare as module
from data_prep.prepare import CONTAMINATED_FILE, prepare
from data_prep.report import REPORT_FILE
from data_prep.staged import parts as parts_module
from data_prep.staged.lots import batches_of, lots_of
from dualroute.data.manifest import Manifest
from dualroute.errors import UserError
from tests.data_prep.cleaning.test_cleaning import CHINESE, ENGLISH
from tests.data_prep.conftest import files, story

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>"


@pytest.fixture
def cleaned(corpus, tmp_path, config):
    """Options that use every stage, on a corpus with something for each."""
    (corpus / "same.txt").write_text(story(3))
    (corpus / "near.txt").write_text(story(4).replace("Chapter 4", "Chapter four"))
    (corpus / "tested.txt").write_text(f"{story(100)}\n{ENGLISH}")
    (corpus / "mail.txt").write_text(f"{story(101)}\nwrite to someone@somewhere.org\n")
    (corpus / "chinese.txt").write_text(CHINESE)
    (corpus / "hostile.txt").write_text(HOSTILE)
    evaluation = tmp_path / "evaluation.jsonl"
    evaluation.write_text(json.dumps({"context": ENGLISH}) + "\n")

    def make(**changes):
        options = {
            "min_chars": 60,
            "near_duplicates": True,
            "decontaminate": [str(evaluation)],
            "scrub": ["email"],
            "languages": ["en", "zh"],
        }
        return config(**{**options, **changes})

    return make


def documents_of(manifest: Manifest) -> set[str]:
    found = set()
    for path in manifest.folder.glob("*.tar"):
        found.update(re.findall(rb'"source": "([^"]*)"', path.read_bytes()))
    return {name.decode() for name in found}


def test_bytes_do_not_depend_on_the_workers_and_everything_is_told(cleaned, tmp_path) -> None:
    first = prepare(cleaned())
    second = prepare(cleaned(output=str(tmp_path / "other"), workers=3))
    assert files(first.folder) == files(second.folder)
    names = documents_of(first)
    assert not names & {"tested.txt", "hostile.txt"}
    assert (
        len(names & {"same.txt", "part0/story-003.txt"})
        == len(names & {"near.txt", "part1/story-004.txt"})
        == 1
    )
    dropped = first.preparation["dropped"]
    assert {"duplicate": 1, "near_duplicate": 1, "contaminated": 1, "too_short": 1}.items() <= dropped.items()
    assert first.preparation["cleaning"]["counts"] == {"email replaced": 1}
    kept = sum(split.documents for split in first.splits.values())
    assert first.preparation["cleaning"]["read"] == kept + sum(dropped.values()) == 66
    (line,) = (first.folder / CONTAMINATED_FILE).read_text().splitlines()
    assert json.loads(line)["document"] == "tested.txt"
    assert {"en", "zh"} >= set(first.preparation["composition"]["languages"])
    assert sum(entry["documents"] for entry in first.preparation["composition"]["sources"].values()) == kept


def test_the_page_shows_text_and_runs_none_of_it(cleaned) -> None:
    manifest = prepare(cleaned())
    page = (manifest.folder / REPORT_FILE).read_text()
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in page
    assert not re.search("<(script|img|iframe|link|a) ", page)
    assert "<script" not in page
    assert "default-src 'none'" in page
    for reason in manifest.preparation["dropped"]:
        assert reason in page


class Stop(BaseException):
    """Ends a run as a signal does."""


@pytest.mark.parametrize("after", [1, 3, 5])
def test_an_interrupted_run_goes_on_to_the_same_bytes(after, cleaned, tmp_path, monkeypatch) -> None:
    original = parts_module.PartWriter.close
    closed: list[parts_module.PartWriter] = []
    last = 1 << 30

    def close(writer):
        closed.append(writer)
        if len(closed) == last:
            raise Stop
        return original(writer)

    monkeypatch.setattr(parts_module.PartWriter, "close", close)
    expected = files(prepare(cleaned(output=str(tmp_path / "whole"))).folder)
    total, last = len(closed), after
    assert total > 5
    closed.clear()
    with pytest.raises(Stop):
        prepare(cleaned())
    last = 1 << 30
    closed.clear()
    again = prepare(cleaned(workers=2))
    assert files(again.folder) == expected
    assert len(closed) == total - (after - 1)


@pytest.mark.parametrize("ending", [".zst", ".signed", ".json"])
def test_a_damaged_part_of_an_interrupted_run_is_made_again(ending, cleaned, tmp_path, monkeypatch) -> None:
    expected = files(prepare(cleaned(output=str(tmp_path / "whole"))).folder)

    def stop(*args, **kwargs):
        raise Stop

    monkeypatch.setattr(module, "train_tokenizer", stop)
    with pytest.raises(Stop):
        prepare(cleaned())
    monkeypatch.undo()
    damaged = sorted((Path(cleaned().output) / ".prepare" / "staged").glob(f"*-00000{ending}"))[1]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert files(prepare(cleaned()).folder) == expected


def test_documents_of_other_corpora_count_as_seen(cleaned, tmp_path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.txt").write_text(story(7))
    (other / "y.txt").write_text(story(8).replace("Chapter", "Section"))
    manifest = prepare(cleaned(near_duplicates_of=[str(other)]))
    assert not documents_of(manifest) & {"part1/story-007.txt", "part2/story-008.txt"}
    dropped = manifest.preparation["dropped"]
    assert (dropped["duplicate"], dropped["near_duplicate"]) == (2, 2)
    assert str(tmp_path) not in json.dumps(manifest.preparation)
    with pytest.raises(UserError, match=r"near_duplicates_of.*is a prepared data set"):
        prepare(cleaned(near_duplicates_of=[str(manifest.folder)], output=str(tmp_path / "x")))


@pytest.mark.parametrize("limit", [{"max_documents": 9}, {"max_bytes": 5000}])
def test_reading_ends_at_a_limit(limit, cleaned, tmp_path, monkeypatch) -> None:
    plain = prepare(cleaned(output=str(tmp_path / "plain"), near_duplicates=False, **limit))
    near = prepare(cleaned(**limit))
    kept = [sum(split.documents for split in manifest.splits.values()) for manifest in (plain, near)]
    assert kept[0] == kept[1]
    assert plain.preparation["cleaning"]["read"] < 60
    if "max_documents" in limit:
        assert kept[0] == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quality": ["gofer"]}, "quality must be among gopher, "),
        ({"quality": []}, "quality is \\[\\]; name each once"),
        ({"scrub": ["email", "email"]}, "scrub is .*; name each once"),
        ({"languages": ["xx"]}, "languages: 'xx' is not known; did you mean"),
        ({"languages": None, "language_confidence": 0.5}, "language_confidence needs languages"),
        ({"language_confidence": 1.5}, "language_confidence must lie between 0 and 1"),
        ({"near_duplicate_similarity": 0.1}, "near_duplicate_similarity must lie between 0.3 and 1"),
        ({"near_duplicates": False, "near_duplicates_of": ["x"]}, "near_duplicates_of needs near_duplicates"),
        ({"near_duplicates_of": ["/nowhere/x"]}, "near_duplicates_of: corpus /nowhere/x: no such file"),
        ({"decontaminate": ["/nowhere/x"]}, "decontaminate: corpus /nowhere/x: no such file"),
        ({"decontaminate_ngram": 1}, "decontaminate_ngram must be from 2"),
        ({"decontaminate_action": "word"}, "decontaminate_action must be among document, passage"),
        ({"languages": ["de"]}, "no document to use \\(.*language: en"),
    ],
)
def test_options_that_cannot_be_meant(changes, message, cleaned) -> None:
    config = cleaned(**changes)
    with pytest.raises(UserError, match=message) as error:
        prepare(config)
    assert "\n" not in str(error.value)
    assert not Path(config.output).exists()


def test_another_option_is_named(cleaned) -> None:
    prepare(cleaned())
    with pytest.raises(UserError, match=r"other options \(near_duplicate_similarity 0.7, now 0.8"):
        prepare(cleaned(near_duplicate_similarity=0.8))


def test_lots_and_parts_follow_sizes_alone(corpus) -> None:
    from data_prep import corpora

    opened = corpora.open_corpus(str(corpus))
    for size in (1, 2000, 1 << 30):
        lots = lots_of(opened, size)
        assert [file for lot in lots for file in lot.files] == list(opened.files)
        assert [lot.number for lot in lots] == list(range(len(lots)))
    assert len(lots_of(opened, 1)) == 60
    documents = [
        dataclasses.replace(document)
        for document in corpora.documents(opened, module.PrepareConfig().read_options(), corpus)
    ]
    batches = list(batches_of(documents, 2000))
    assert [document for batch in batches for document in batch.documents] == documents
    assert all(sum(len(d.text) for d in batch.documents) >= 2000 for batch in batches[:-1] if batch.ends)


def test_after_an_error_of_the_tokenizer_what_is_cleaned_is_not_cleaned_again(
    cleaned, tmp_path, monkeypatch
) -> None:
    expected = files(prepare(cleaned(output=str(tmp_path / "whole"))).folder)
    too_many = cleaned(vocab_size=60_000)
    output = Path(too_many.output)
    with pytest.raises(UserError, match=r"cleaned documents are kept in .*\.prepare: a run with"):
        prepare(too_many)
    assert [path.name for path in output.iterdir()] == [".prepare"]
    with monkeypatch.context() as patched:
        patched.setattr(parts_module.PartWriter, "close", lambda writer: pytest.fail("cleaned again"))
        again = prepare(cleaned())
    assert files(again.folder) == expected


def test_with_another_option_of_cleaning_or_with_force_it_is_cleaned_again(cleaned, monkeypatch) -> None:
    closed = []
    original = parts_module.PartWriter.close
    monkeypatch.setattr(parts_module.PartWriter, "close", lambda w: closed.append(w) or original(w))

    def parts_of(**changes) -> int:
        closed.clear()
        with pytest.raises(UserError, match="cleaned documents are kept"):
            prepare(cleaned(vocab_size=60_000, **changes))
        return len(closed)

    total = parts_of()
    assert total > 1
    assert parts_of() == 0
    assert parts_of(force=True) == total
    assert parts_of(min_chars=50) == total
