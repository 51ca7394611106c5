"""What `dualroute data inspect | stats | sample | diff` say of sets whose figures are known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_prep.prepare import PrepareConfig, prepare
from dualroute.cli import main
from dualroute.data.manifest import Manifest
from dualroute.data.tools.documents import documents, length_histogram, spread
from tests.data.shards import numbered, write_dataset

TEXTS = {
    "poems/one": "the river sleeps under the old stone",
    "poems/two": "a bird sees the green hill and leaves",
    "poems/three": "over the small house a red bird finds the river",
    "code/a": "def hill(stone): return river[stone]",
    "code/b": "x = 1\ny = 2\nprint(x + y)",
}


def prepare_texts(folder: Path, texts: dict[str, str], **options: object) -> Manifest:
    for name, text in texts.items():
        (folder / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "corpus" / f"{name}.txt").write_text(text)
    settings = {"vocab_size": 300, "reserved_tokens": 0, "val_documents": ["poems/two*"], "progress": False}
    return prepare(
        PrepareConfig(corpus=str(folder / "corpus"), output=str(folder / "set"), **{**settings, **options})  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return prepare_texts(tmp_path_factory.mktemp("mine"), TEXTS)


def test_inspect(mine: Manifest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    assert main(["data", "inspect", str(mine.folder)]) == 0
    out = capsys.readouterr().out
    assert f"{mine.split('train').tokens:,}" in out
    assert mine.fingerprint in out
    assert "option vocab_size" in out


def test_stats_add_up(mine: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", str(mine.folder), "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "stats.json").read_text())
    train = found["splits"]["train"]
    assert sum(train["lengths"]) == train["documents"] == train["read"] == 4
    assert {name: group["documents"] for name, group in train["sources"].items()} == {"poems": 2, "code": 2}
    for key in ("tokens", "bytes"):
        assert sum(group[key] for group in train["sources"].values()) == getattr(mine.split("train"), key)
    assert train["duplicates"] == 0
    assert found["texts_in_several_splits"] == 0
    for name in ("lengths.png", "sources-train.png", "sources-val.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "written: stats.json, lengths.png" in capsys.readouterr().out


def test_duplicates_and_leaks(tmp_path: Path) -> None:
    """Of documents without notes, those with the same ids."""
    train = [[1, 5, 6, 2], [1, 7, 2], [1, 5, 6, 2], [1, 5, 6, 2], [1, 8, 2]]
    manifest = write_dataset(tmp_path / "set", train, [[1, 7, 2], [1, 9, 9, 2]], documents_per_shard=2)
    assert main(["data", "stats", str(manifest.folder), "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert found["splits"]["train"]["duplicates"] == 2
    assert found["splits"]["val"]["duplicates"] == 0
    assert found["texts_in_several_splits"] == 1


def test_lengths_are_those_of_all(tmp_path: Path) -> None:
    lengths = [2, 3, 4, 7, 8, 8, 1000, 1]
    manifest = write_dataset(tmp_path, numbered(lengths), documents_per_shard=3)
    counts, edges, shortest, longest = length_histogram(manifest, "train")
    assert (shortest, longest) == (1, 1000)
    assert edges.tolist() == [2**power for power in range(11)]
    assert counts.tolist() == [1, 2, 2, 2, 0, 0, 0, 0, 0, 1]
    assert sum(int(document.tokens) for document in documents(manifest, "train")) == sum(lengths)


def test_few_documents_come_from_all_over(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, numbered([3] * 40), documents_per_shard=4)
    shards = manifest.split("train").shards
    assert spread(shards, 1000) == list(range(10))
    assert spread(shards, 20) == [0, 2, 4, 6, 8]
    assert spread(shards, 1) == [0]
    assert [one.number for one in documents(manifest, "train", [2])] == [8, 9, 10, 11]


def test_sample(mine: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "sample", str(mine.folder), "--documents", "50"]) == 0
    out = capsys.readouterr().out
    for name, text in TEXTS.items():
        assert (text.splitlines()[0] in out) == (name != "poems/two")
    assert (
        main(["data", "sample", str(mine.folder), "--split", "val", "--max_tokens", "3", "--ids", "true"])
        == 0
    )
    assert "tokens more" in capsys.readouterr().out
    assert main(["data", "sample", str(mine.folder), "--number", "4"]) == 2
    assert "number 4 is not below the 4 documents" in capsys.readouterr().err


def test_what_commands_a_terminal_is_shown_as_text(
    mine: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"a": "red [bold]bird[/bold] \u202e stone", "b[red]": "other stone"}
    manifest = prepare_texts(tmp_path, texts, val_documents=["b*"], tokenizer=str(mine.tokenizer_path))
    assert main(["data", "sample", str(manifest.folder)]) == 0
    out = capsys.readouterr().out
    assert "[bold]bird[/bold]" in out
    assert "\u202e" not in out
    assert main(["data", "stats", str(manifest.folder)]) == 0
    assert "b[red].txt" in capsys.readouterr().out


def test_diff_of_equal_sets(mine: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(mine.folder, tmp_path / "copy")
    assert main(["data", "diff", str(mine.folder), str(tmp_path / "copy")]) == 0
    assert "the two sets are equal" in capsys.readouterr().out
    assert main(["data", "diff", str(mine.folder), str(mine.folder)]) == 2


def test_diff(
    mine: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    others = {name: text for name, text in TEXTS.items() if name != "code/a"} | {"code/c": "z = stone"}
    other = prepare_texts(
        tmp_path, others, tokenizer=str(mine.tokenizer_path), val_documents=["poems/three*"], min_chars=2
    )
    assert main(["data", "diff", str(mine.folder), str(other.folder)]) == 1
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    assert ["only in", str(mine.folder), "1"] in rows
    assert ["", "train 0: code/a.txt", ""] in rows
    assert any(row[:1] == [""] and "code/c.txt" in row[1] for row in rows if len(row) == 3)
    assert ["in another split of", str(other.folder), "2"] in rows
    assert ["option min_chars", "1", "2"] in rows
    assert main(["data", "diff", str(mine.folder), str(other.folder), "--documents", "false"]) == 1
    assert "only in" not in capsys.readouterr().out
