"""An interrupted preparation believes nothing that is not as it was written, and ends at the same bytes."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.notes import STATE_FOLDER, Unusable, read_note, write_note
from data_prep.output_folder import PREPARATION_FILE
from data_prep.prepare import PrepareConfig, prepare
from data_prep.shards import write_index, write_shards
from dualroute.data.manifest import canonical_json
from dualroute.errors import UserError
from dualroute.files import file_sha256, locked
from tests.conftest import write_corpus

NOTES = [f"{STATE_FOLDER}/{name}" for name in ("survey.json", "train-00001.json", "train-00001.rows")]
FILES = [*NOTES, "train-00001.tar", "tokenizer.model", PREPARATION_FILE]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@dataclasses.dataclass
class Runs:
    """A preparation that ended well, and the same one stopped before its index was written."""

    config: PrepareConfig
    whole: dict[str, bytes]
    stopped: Path
    other: Path  # stopped too, of another corpus


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    base = tmp_path_factory.mktemp("runs")
    config = PrepareConfig(
        corpus=str(write_corpus(base / "corpus", 30)), output=str(base / "whole"), vocab_size=300,
        reserved_tokens=0, val_fraction=0.2, shard_size_mb=0.006, workers=1, progress=False,
    )  # fmt: skip
    prepare(config)
    other = dataclasses.replace(config, corpus=str(write_corpus(base / "more", 30, seed=1)))
    stop(dataclasses.replace(config, output=str(base / "stopped")))
    stop(dataclasses.replace(other, output=str(base / "other")))
    return Runs(config, contents(base / "whole"), base / "stopped", base / "other")


def stop(config: PrepareConfig) -> None:
    def interrupt(*args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.prepare.write_index", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)


@pytest.fixture
def broken(runs, tmp_path) -> Path:
    shutil.copytree(runs.stopped, tmp_path / "broken")
    return tmp_path / "broken"


def continued(runs: Runs, folder: Path, capsys) -> str:
    """Continue in ``folder``; it must end at the bytes of the whole run. Gives back what was said."""
    prepare(dataclasses.replace(runs.config, output=str(folder), progress=True))
    assert contents(folder) == runs.whole
    return capsys.readouterr().err


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def wrong_types(path: Path) -> None:
    path.write_bytes(b'{"content": [], "options": 3, "inputs": {"a": null}}')


def nested(path: Path) -> None:
    path.write_bytes(b"[" * 100_000)


def folder_instead(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere/at/all")


def missing(path: Path) -> None:
    path.unlink()


DAMAGES = [truncate, empty, noise, flip, wrong_types, nested, folder_instead, fifo, dangling, missing]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_notes_and_files(runs, broken, capsys, file, damage):
    damage(broken / file)
    if (file, damage) == (PREPARATION_FILE, missing):
        with pytest.raises(UserError, match=r"not empty .*; choose a folder"):
            continued(runs, broken, capsys)
        return
    if damage is folder_instead and file not in NOTES:  # not of our making: nothing is deleted
        with pytest.raises(UserError, match=rf"{file}: is in the way .*; remove it"):
            continued(runs, broken, capsys)
        assert (broken / file / "inside").exists()
        return
    said = continued(runs, broken, capsys)
    expected = {
        "survey.json": "the corpus is surveyed again",
        "tokenizer.model": "the corpus is surveyed again",
        PREPARATION_FILE: "written again: the notes are of the same plan",
    }.get(Path(file).name, "train-00001.tar: made again")
    assert said.count(expected) == (damage is not missing or not file.endswith(".json")), said


@pytest.mark.parametrize("file", [*NOTES, "train-00001.tar", "tokenizer.model"])
def test_files_of_another_preparation(runs, broken, capsys, file):
    shutil.copy2(runs.other / file, broken / file)
    assert "again" in continued(runs, broken, capsys)


def test_a_shard_of_another_preparation_with_the_same_tokenizer(runs, broken, capsys):
    """Note, rows and tar fit each other; only the plan tells that the text is another."""
    other = runs.other.with_name("same-tokenizer")
    stop(
        dataclasses.replace(
            runs.config, corpus=str(runs.other.with_name("more")), output=str(other),
            tokenizer=str(runs.stopped / "tokenizer.model"),
        )
    )  # fmt: skip
    for file in (*NOTES[1:], "train-00001.tar"):
        shutil.copy2(other / file, broken / file)
    assert "train-00001.tar: made again; it is of another preparation" in continued(runs, broken, capsys)


def alter_note(path: Path, change) -> None:
    """Change what a note says and give it a checksum that fits."""
    content = read_note(path)
    change(content)
    write_note(path, content)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda note: note["shard"].update(tokens=note["shard"]["tokens"] + 1), "impossible"),
        (lambda note: note["shard"].update(bytes=note["shard"]["bytes"] - 1), "impossible"),
        (lambda note: note["shard"].update(documents=1), "damaged"),
        (lambda note: note["shard"].update(size=512), "none of this version|impossible"),
        (lambda note: note["shard"].update(sha256="0" * 64), "contents are not what was written"),
        (lambda note: note["shard"].update(file="train-00000.tar"), "that of another shard"),
        (lambda note: note["shard"].update(tokens=None), "none of this version"),
        (lambda note: note.update(shard=[]), "none of this version"),
        (lambda note: note.update(rows_sha256=5), "rows of the index, train-00001.rows, are damaged"),
        (lambda note: note.update(dtype="<u4"), "another tokenizer"),
    ],
)
def test_a_note_that_is_wrong_but_well_formed(runs, broken, capsys, change, reason):
    alter_note(broken / NOTES[1], change)
    said = continued(runs, broken, capsys)
    assert said.count("train-00001.tar: made again; ") == 1
    assert any(word in said for word in reason.split("|")), said


def move_a_token(rows: np.ndarray) -> np.ndarray:
    """One document longer, one shorter: possible, and wrong."""
    moved = rows.copy()
    moved[:2, 2] += (-1, 1)
    return moved


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[::-1],
        lambda rows: rows - [0, -1, 0, 0],
        lambda rows: rows - [1, 0, 0, 0],
        lambda rows: np.concatenate([rows[:1], rows[:1], rows[2:]]),
        lambda rows: rows * [1, -1, 1, 1],
        move_a_token,
    ],
)
def test_a_garbage_index_with_a_valid_checksum(runs, broken, capsys, change):
    path = broken / NOTES[2]
    rows = np.frombuffer(path.read_bytes(), dtype="<i8").reshape(-1, 4)
    path.write_bytes(change(rows).astype("<i8").tobytes())
    alter_note(broken / NOTES[1], lambda note: note.update(rows_sha256=file_sha256(path)))
    assert "train-00001.tar: made again; " in continued(runs, broken, capsys)


@pytest.mark.parametrize(
    "change",
    [
        lambda survey: survey.update(splits={"train": survey["splits"]["train"]}),
        lambda survey: survey["splits"]["val"].update(documents=-1),
        lambda survey: survey["splits"]["val"].update(bytes=True),
        lambda survey: survey.update(dropped={"empty": "3"}),
        lambda survey: survey.update(splits=[]),
        lambda survey: survey.update(tokenizer_sha256=None),
        lambda survey: survey.pop("plan"),
    ],
)
def test_a_survey_that_is_wrong_but_well_formed(runs, broken, capsys, change):
    alter_note(broken / NOTES[0], change)
    assert continued(runs, broken, capsys).count("the corpus is surveyed again; ") == 1


def test_counts_of_a_survey_are_compared_with_what_was_written(runs, broken, capsys):
    """The last line of defence: the corpus holds what the survey says, or there is no manifest."""
    alter_note(broken / NOTES[0], lambda survey: survey["splits"]["train"].update(documents=1))
    with pytest.raises(UserError, match="changed while it was read"):
        continued(runs, broken, capsys)
    assert not (broken / "manifest.json").exists()


def test_sound_work_is_not_done_again(runs, broken, capsys):
    times = {path: path.stat().st_mtime_ns for path in broken.glob("*.tar")}
    said = continued(runs, broken, capsys)
    assert "again" not in said
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_rows_that_are_damaged_between_the_look_and_the_use(tmp_path, runs):
    from dualroute.data.tokenizer import Tokenizer

    (tmp_path / STATE_FOLDER).mkdir()
    shards = write_shards([], Tokenizer(runs.stopped / "tokenizer.model"), tmp_path, "uint16", 1000, 1)
    assert shards == {"train": [], "val": []}
    shutil.copytree(runs.stopped, tmp_path / "late")
    note = read_note(runs.stopped / NOTES[1])
    from dualroute.data.manifest import Shard

    noise(tmp_path / "late" / STATE_FOLDER / "train-00000.rows")
    with pytest.raises(UserError, match=r"train-00001\.tar: its rows .*; run `dualroute prepare` again"):
        write_index(tmp_path / "late", "train", [Shard(**note["shard"])])


def test_notes(tmp_path):
    path = tmp_path / "note.json"
    assert read_note(path) is None
    write_note(path, {"a": [1, None, "é"]})
    assert read_note(path) == {"a": [1, None, "é"]}
    path.write_text(json.dumps({"content": {"a": 1}, "sha256": "0" * 64}))
    with pytest.raises(Unusable, match=r"note\.json is damaged"):
        read_note(path)
    assert canonical_json({"b": 1, "a": 2}) == b'{"a":2,"b":1}'


def test_a_lock_is_held_by_one(tmp_path):
    path = tmp_path / "lock"
    with locked(path) as first:
        assert first
        with locked(path) as second:
            assert not second
        with locked(path, wait=0.2) as third:
            assert not third
        path.unlink()  # by its last holder, say: the next file of this name is another one
        with locked(path) as fourth:
            assert fourth
    assert not path.exists()
