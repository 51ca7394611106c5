"""The whole preparation: the same bytes whatever happens on the way, one clear line for what goes wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest

from data_prep.prepare import PrepareConfig, prepare, summary
from dualroute import files
from dualroute.data.manifest import MANIFEST_FILE, Manifest
from dualroute.errors import UserError
from tests.data_prep.conftest import story

ROOT = Path(__file__).resolve().parents[2]


def contents(folder: str | Path) -> dict[str, bytes]:
    """Every file of a finished dataset."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def refused(config: PrepareConfig, message: str) -> None:
    """``config`` is refused in one line, and nothing is left that looks like data."""
    existed = Path(config.output).exists()
    with pytest.raises(UserError, match=message) as error:
        prepare(config)
    assert "\n" not in str(error.value)
    if not existed:
        assert not Path(config.output).exists()


# the same bytes


def test_the_bytes_do_not_depend_on_the_workers(config, tmp_path):
    outputs = [str(tmp_path / f"out{workers}") for workers in (1, 2, 5)]
    for workers, output in zip((1, 2, 5), outputs, strict=True):
        prepare(config(workers=workers, output=output))
    assert contents(outputs[0]) == contents(outputs[1]) == contents(outputs[2])
    assert set(contents(outputs[0])) >= {MANIFEST_FILE, "tokenizer.model", "train.index.npy", "val-00000.tar"}


def test_a_second_run_does_nothing(config):
    first = prepare(config())
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    again = prepare(config(workers=3))
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == times


KILLED = """
    import os, signal, sys
    from data_prep import shards
    import data_prep.prepare as module
    from data_prep.prepare import PrepareConfig, prepare

    def kill(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    where, corpus, output = sys.argv[1:]
    if where == "tokenizer":
        module.train_tokenizer = kill
    elif where == "index":
        module.write_index = kill
    else:  # in the middle of a document of the third shard
        written = 0
        original = shards.ShardWriter._write

        def write(self, data):
            global written
            if self.number == 2:
                written += 1
                if written == 5:
                    self._stream.write(data[:10])
                    self._stream.flush()
                    kill()
            original(self, data)

        shards.ShardWriter._write = write
    prepare(PrepareConfig(corpus=corpus, output=output, vocab_size=400, val_fraction=0.2, shard_size_mb=0.006,
                          workers=2, progress=False))
"""


@pytest.mark.parametrize("where", ["tokenizer", "shard", "index"])
def test_a_killed_run_is_continued_to_the_same_bytes(config, corpus, tmp_path, where):
    whole, killed = str(tmp_path / "whole"), tmp_path / "killed"
    prepare(config(output=whole))
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), where, str(corpus), str(killed)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert process.returncode == -signal.SIGKILL
    assert not (killed / MANIFEST_FILE).exists()
    finished = {path: path.stat().st_mtime_ns for path in killed.glob("*.tar")}
    if where == "shard":
        assert {path.name for path in finished} >= {"train-00000.tar", "train-00001.tar"}
        assert list(killed.glob(".train-00002.tar.partial-*"))
    prepare(config(output=str(killed)))
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # not made again
    assert contents(killed) == contents(whole)


def test_a_damaged_finished_shard_of_a_killed_run_is_made_again(config, tmp_path, monkeypatch):
    whole, broken = str(tmp_path / "whole"), tmp_path / "broken"
    prepare(config(output=whole))
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.prepare.write_index", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(config(output=str(broken)))
    (broken / "train-00001.tar").write_bytes(b"")
    (broken / "train-00002.tar").unlink()
    prepare(config(output=str(broken)))
    assert contents(broken) == contents(whole)


# what changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 401}, r"other options \(vocab_size 400, now 401\); use --force true"),
        ({"seed": 1, "min_chars": 5}, r"options \(min_chars 1, now 5, seed 0, now 1\)"),
    ],
)
def test_other_options_are_named(config, change, message):
    before = contents(prepare(config()).folder)
    refused(config(**change), message)
    assert contents(config().output) == before
    assert prepare(config(**change, force=True)).preparation["options"]["seed"] == change.get("seed", 0)


def test_other_inputs_are_named(config, corpus):
    prepare(config())
    (corpus / "new.txt").write_text("more text")
    refused(config(), r"other inputs \(new: new\.txt\)")
    (corpus / "new.txt").unlink()
    prepare(config())
    path = corpus / "part0" / "story-000.txt"
    path.write_text(path.read_text().replace("Chapter", "Section"))
    (corpus / "part1" / "story-001.txt").unlink()
    refused(config(), r"\(gone: part1/story-001\.txt\); inputs \(changed: part0/story-000\.txt\)")


def test_an_interrupted_run_is_not_continued_with_other_options(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.prepare.write_index", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(config())
    refused(config(seed=9), r"options \(seed 0, now 9\)")


def test_a_dataset_may_move_and_so_may_its_corpus(config, corpus, tmp_path):
    first = prepare(config())
    shutil.move(first.folder, tmp_path / "moved")
    shutil.move(corpus, tmp_path / "elsewhere" / "corpus")
    moved = prepare(config(output=str(tmp_path / "moved"), corpus=str(tmp_path / "elsewhere" / "corpus")))
    assert moved.fingerprint == first.fingerprint


def test_force_leaves_foreign_files_alone(config):
    folder = prepare(config()).folder
    (folder / "notes.txt").write_text("mine")
    prepare(config(seed=3, force=True))
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_finished_dataset_that_lost_a_shard(config):
    (prepare(config()).folder / "train-00001.tar").unlink()
    refused(config(), r"train-00001\.tar: no such file; use --force true to prepare")
    assert len(prepare(config(force=True)).split("train").shards) > 3


def test_a_corpus_that_changes_between_the_passes(config, corpus, monkeypatch):
    from data_prep.prepare import train_tokenizer

    def meddle(*args):
        (corpus / "part0" / "story-000.txt").write_text("quite another text")
        return train_tokenizer(*args)

    monkeypatch.setattr("data_prep.prepare.train_tokenizer", meddle)
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(config())
    assert not (Path(config().output) / MANIFEST_FILE).exists()


def test_names_that_are_not_utf8(config, tmp_path):
    """A name is any bytes; manifest and shards are UTF-8 all the same."""
    folder = tmp_path / os.fsdecode(b"corpus-\xff")
    for number in range(20):
        path = folder / os.fsdecode(b"\xe9-%02d.txt" % number)
        path.parent.mkdir(exist_ok=True)
        path.write_text(story(number))
    held_out = ["*-0*"]
    manifest = prepare(config(corpus=str(folder), val_fraction=None, val_documents=held_out, progress=True))
    assert manifest.split("val").documents == 10
    assert Manifest.load(manifest.folder).preparation["options"]["corpus"].startswith("corpus-")
    with tarfile.open(manifest.shard_paths("val")[0]) as archive:
        about = json.load(archive.extractfile(archive.getmembers()[1]))
    assert about["source"].endswith("-00.txt")
    assert prepare(config(corpus=str(folder), val_fraction=None, val_documents=held_out)) == manifest


# splits and limits


def test_held_out_by_name(config):
    manifest = prepare(config(val_fraction=None, val_documents=["story-00*", "part1/story-013.txt"]))
    assert manifest.split("val").documents == 11


def test_validation_documents_do_not_shape_the_vocabulary(config, corpus, tmp_path):
    options = {"val_fraction": None, "val_documents": ["story-00*"]}
    first = prepare(config(**options))
    (corpus / "part0" / "story-000.txt").write_text("zyx wvu " * 300)
    second = prepare(config(**options, output=str(tmp_path / "second")))
    assert first.tokenizer.sha256 == second.tokenizer.sha256
    assert first.fingerprint != second.fingerprint


def test_counts_of_what_was_dropped_are_kept_and_shown(config, corpus, capsys):
    (corpus / "empty.txt").write_text("")
    (corpus / "again.txt").write_text(story(5))
    (corpus / "short.txt").write_text("x")
    manifest = prepare(config(min_chars=10, progress=True))
    assert Manifest.load(manifest.folder).preparation["dropped"] == {
        "duplicate": 1,
        "empty": 1,
        "too_short": 1,
    }
    assert "dropped: 1 duplicate, 1 empty, 1 too_short" in summary(manifest)
    assert summary(manifest) in capsys.readouterr().err


def test_no_more_than_max_documents(config):
    manifest = prepare(config(max_documents=20))
    assert sum(split.documents for split in manifest.splits.values()) == 20


def test_an_existing_tokenizer_is_used_as_it_is(config, tmp_path):
    first = prepare(config())
    second = prepare(config(tokenizer=str(first.tokenizer_path), output=str(tmp_path / "second"), seed=5))
    assert second.tokenizer == first.tokenizer
    assert "vocab_size" not in second.preparation["options"]


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(config, monkeypatch):
    monkeypatch.setattr("data_prep.prepare.token_dtype", lambda vocab_size: "uint32")
    assert prepare(config()).dtype == "uint32"


def test_the_manifest_tells_no_paths(config, tmp_path):
    folder = prepare(config()).folder
    for name in (MANIFEST_FILE, "preparation.json"):
        assert str(tmp_path) not in (folder / name).read_text()


# bad input: one line, nothing left behind


def test_no_validation_document_is_an_error_with_a_remedy(config):
    refused(
        config(val_fraction=1e-9),
        r"val_fraction 1e-09 holds out none of its 60 documents; raise --val_fraction",
    )
    refused(config(val_fraction=None, val_documents=["nothing*"]), r"'nothing\*' fits none of 60 documents")


def test_no_training_document_is_an_error_with_a_remedy(config, corpus):
    refused(config(val_fraction=1 - 1e-9), "holds out all of its 60 documents; lower --val_fraction")
    refused(config(val_fraction=None, val_documents=["*"]), "val_documents holds out all")


def test_an_empty_corpus(config, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    refused(config(corpus=str(tmp_path / "empty.txt")), r"empty\.txt: no document to use \(1 empty\)")
    refused(config(min_chars=10**6), r"no document to use \(60 too_short\)")


def test_undecodable_text(config, corpus):
    (corpus / "part2" / "zz.txt").write_bytes(b"abc\xff")
    refused(config(), r"part2/zz\.txt: byte 3 ")
    assert prepare(config(on_decode_error="skip")).preparation["dropped"] == {"undecodable": 1}


def test_a_vocabulary_that_is_too_large(config):
    refused(
        config(vocab_size=60_000),
        "vocab_size 60000 is larger than the corpus allows; the largest possible is",
    )


def test_unknown_corpus_missing_path_and_missing_tokenizer(config, tmp_path):
    refused(config(corpus="gutenburg"), "did you mean 'gutenberg'")
    refused(config(corpus=str(tmp_path / "no.txt")), r"no\.txt: no such file or folder")
    refused(config(tokenizer=str(tmp_path / "no.model")), r"no\.model: no such file; give a sentencepiece")


def test_a_truncated_input(config, corpus):
    shutil.make_archive(str(corpus / "more"), "gztar", corpus / "part0")
    data = (corpus / "more.tar.gz").read_bytes()
    (corpus / "more.tar.gz").write_bytes(data[:-100])
    refused(config(), r"more\.tar\.gz: the file is damaged or cut off")


def test_an_occupied_output_folder_is_left_alone(config, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.doc").write_text("mine")
    for force in (False, True):
        refused(config(output=str(occupied), force=force), r"not empty \(thesis\.doc\); choose a folder")
    assert [path.name for path in occupied.iterdir()] == ["thesis.doc"]
    refused(config(output=str(occupied / "thesis.doc")), "exists and is not a folder")
    refused(config(output=str(occupied / "thesis.doc" / "x")), "Not a directory")


def test_an_output_folder_that_cannot_be_written(config, monkeypatch):
    def denied(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    refused(config(), r"shards: not writable \(Permission denied\); choose another output folder")


def test_two_preparations_at_once(config, monkeypatch):
    from data_prep.prepare import train_tokenizer

    def meanwhile(*args):
        refused(config(), "another preparation is writing there")
        return train_tokenizer(*args)

    monkeypatch.setattr("data_prep.prepare.train_tokenizer", meanwhile)
    assert prepare(config()).split("train").documents > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_fraction": 0.0}, "val_fraction must lie between 0 and 1"),
        ({"val_fraction": 0.5, "val_documents": ["x"]}, "exclude each other"),
        ({"workers": 0}, "workers must be positive"),
        ({"shard_size_mb": -1.0}, "shard_size_mb must be positive"),
        ({"min_chars": -1}, "min_chars must not be negative"),
        ({"min_chars": 9, "max_chars": 8}, "max_chars 8 is below min_chars 9"),
        ({"separator": ""}, "separator must not be empty"),
        ({"on_decode_error": "ignore"}, "on_decode_error must be one of error, replace, skip"),
        ({"tokenizer_type": "wordpiece"}, "tokenizer_type must be one of bpe, unigram"),
    ],
)
def test_options_that_make_no_sense(config, change, message):
    refused(config(**change), message)


# a full disk


def test_a_full_disk_keeps_what_is_finished_and_the_next_run_continues(config, tmp_path, monkeypatch):
    whole = str(tmp_path / "whole")
    prepare(config(output=whole))
    from data_prep.shards import ShardWriter

    original = ShardWriter._write

    def full(self, data):
        if self.number == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_write", full)
        with pytest.raises(UserError, match="no space left; free some and run again") as error:
            prepare(config())
        assert "\n" not in str(error.value)
    output = Path(config().output)
    assert (output / "train-00001.tar").exists()
    assert not (output / "train-00002.tar").exists()
    assert not list(output.glob(".*partial*"))
    assert not (output / MANIFEST_FILE).exists()
    prepare(config())
    assert contents(output) == contents(whole)


def test_a_disk_that_is_full_at_any_write(config, tmp_path, monkeypatch):
    """Plan, tokenizer, survey, a tar, its rows, its note, an index, the manifest: whichever is refused."""
    options = {"shard_size_mb": 0.02, "tokenizer_sample_mb": 0.01}
    whole = contents(prepare(config(output=str(tmp_path / "whole"), **options)).folder)
    original, written = files.publish, []
    writes = 1

    def full(temporary, path):
        written.append(Path(path).name)
        if len(written) == writes:
            raise OSError(errno.ENOSPC, "No space left on device", str(temporary))
        original(temporary, path)

    monkeypatch.setattr(files, "publish", full)
    names = set()
    for number in range(100):
        output = tmp_path / f"out{number}"
        written.clear()
        writes = number + 1
        lines = []
        try:
            prepare(config(output=str(output), **options))
        except UserError as error:
            lines.append(str(error))
        if not lines:
            break
        assert "no space left; free some and run again" in lines[0]
        assert "\n" not in lines[0]
        names.add(written[-1])
        assert not (output / MANIFEST_FILE).exists()
        assert not list(output.rglob(".*partial*"))
        writes = 0
        prepare(config(output=str(output), **options))
        assert contents(output) == whole
    expected = {"preparation.json", "tokenizer.model", "survey.json", "train-00001.rows", "train-00001.json"}
    assert names >= expected | {"train-00001.tar", "train.index.npy", MANIFEST_FILE}


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 96 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no permission to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(config, small_disk):
    with pytest.raises(UserError, match="no space left"):
        prepare(config(output=str(small_disk / "out")))
    assert not (small_disk / "out" / MANIFEST_FILE).exists()
    assert not list((small_disk / "out").glob(".*partial*"))


# real text, where there is some


@pytest.mark.slow
def test_real_books(tmp_path):
    data = Path(os.environ.get("DUALROUTE_DATA", ROOT.parent / "shared" / "data"))
    archive = data / "tinyshakespeare" / "input.txt.gz"
    if not archive.exists():
        pytest.skip(f"{archive} is not there; set DUALROUTE_DATA")
    manifest = prepare(
        PrepareConfig(
            corpus=str(archive),
            output=str(tmp_path / "out"),
            separator="\n\n",
            vocab_size=2000,
            val_fraction=0.05,
            workers=1,
            progress=False,
        )
    )
    total = sum(split.bytes for split in manifest.splits.values())
    assert 1_000_000 < total < 1_115_394
    train = manifest.split("train")
    assert 2.5 < train.bytes / train.targets < 4.5
    assert dataclasses.replace(manifest, folder=Path("elsewhere")).fingerprint == manifest.fingerprint
