"""Whatever happens to an input file: one line that names it, or the damage counted; never a wrong document.

Every kind of file that a preparation reads is cut, emptied, overwritten and flipped at seeded places, gets
wrong JSON types, another kind's contents, or is no file at all.
"""

from __future__ import annotations

import json
import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.prepare import PrepareConfig, prepare
from data_prep.readers.documents import ReadOptions
from data_prep.readers.formats import read_documents
from dualroute.data.manifest import MANIFEST_FILE, Manifest, verify_shards
from dualroute.errors import UserError
from tests.data_prep.samples import TEXTS, every_kind, expected, read, tar, written

KINDS = every_kind()
SEPARATOR = "\x1e"
#: Kinds whose every byte of text is under a checksum, so that no flip may change or lose a text unnoticed.
CHECKED = [name for name in KINDS if name.endswith((".gz", ".xz", ".bz2", ".zst", ".zip"))]


def damaged(name: str, times: int) -> Iterator[bytes]:
    """Seeded variants of a file: cut, flipped and overwritten."""
    data, draw = KINDS[name], random.Random(zlib.crc32(name.encode()))
    yield b""
    for _ in range(times):
        yield data[: draw.randrange(len(data))]
    for _ in range(times):
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 8))):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        yield bytes(changed)
    for _ in range(times // 2):
        start = draw.randrange(len(data))
        filler = draw.choice((b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7))
        yield (data[:start] + filler + data[start + 8 :])[: len(data)]


def outcome(path: Path) -> tuple[list[str], ReadOptions] | None:
    """Texts and counts; None for a refusal, which is one line that names the file."""
    options = ReadOptions(separator=SEPARATOR, max_document_bytes=10_000_000)
    try:
        return [document.text for document in read(path, options)], options
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert path.name in message
    assert len(message) < 500
    return None


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read(tmp_path, name):
    texts, options = outcome(written(tmp_path, name, KINDS[name])) or ([], None)
    assert texts == expected(name)
    assert options is not None
    assert not options.files.skipped


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_refused_or_counted(tmp_path, name):
    refused = 0
    for data in damaged(name, times=30):
        result = outcome(written(tmp_path, name, data))
        if result is None:
            refused += 1
            continue
        texts, options = result
        passed_over = sum(entry.count for entry in options.files.skipped.values())
        assert len(texts) <= len(TEXTS) + 40  # a flip may make a separator or a line end
        if not texts:
            assert passed_over or options.dropped
        if name in CHECKED:
            assert set(texts) <= set(TEXTS)
            assert len(texts) + passed_over >= (len(TEXTS) if data else 1)
    if name in CHECKED:
        assert refused > 30


@pytest.mark.parametrize("name", KINDS)
def test_another_kinds_contents_are_refused_or_counted(tmp_path, name):
    for other, data in KINDS.items():
        result = outcome(written(tmp_path, name, data))
        if result is None:
            continue
        texts, options = result
        if name.endswith(".txt"):  # JSON and CSV are text too
            assert "".join(texts) == data.decode().replace(SEPARATOR, "")
        else:
            assert texts == expected(other)
        assert not options.files.skipped


WRONG_VALUES = [None, 5, 1.5, True, [], {}, ["text"], {"text": "x"}, float("nan"), -1]


@pytest.mark.parametrize("value", WRONG_VALUES, ids=repr)
def test_wrong_types_in_json_are_refused_or_counted(tmp_path, value):
    for record in (value, [value], {"text": value}, [{"text": value}], {"data": value}, {"data": [value]}):
        text = json.dumps(record)
        files = {
            "a.json": text.encode(),
            "a.jsonl": text.encode(),
            "b.jsonl": f'{{"text": "good"}}\n{text}\n'.encode(),
            "a.tar": tar({"x.json": text.encode()}),
        }
        for name, data in files.items():
            result = outcome(written(tmp_path, name, data))
            if result is not None:
                texts, options = result
                assert set(texts) <= {"good", "x"}
                assert "x" in texts or options.files.skipped or options.dropped


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, name):
    path = tmp_path / name
    makers = {
        "is a folder": path.mkdir,
        "is a named pipe": lambda: os.mkfifo(path),
        "a link to a file that is not there": lambda: path.symlink_to("nowhere"),
        "cannot be read": lambda: path.symlink_to(name),  # to itself
    }
    for message, make in makers.items():
        make()
        with pytest.raises(UserError, match=rf"{name}: {message}"):
            list(read_documents(path, name, ReadOptions()))
        path.rmdir() if path.is_dir() else path.unlink()
    written(tmp_path, "file", b"")
    with pytest.raises(UserError, match=r"cannot be read \(Not a directory\)"):
        list(read_documents(tmp_path / "file" / name, name, ReadOptions()))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """A small vocabulary, so that no preparation here trains one."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for number, text in enumerate(TEXTS):
        written(folder / "corpus", f"{number}.txt", text.encode())
    options = {"vocab_size": 330, "val_fraction": 0.3, "progress": False, "workers": 1}
    prepare(PrepareConfig(corpus=str(folder / "corpus"), output=str(folder / "out"), **options))
    return str(folder / "out" / "tokenizer.model")


@pytest.mark.parametrize("name", KINDS)
def test_a_preparation_from_damaged_input_leaves_nothing_or_a_whole_data_set(tmp_path, name, tokenizer):
    """And with on_bad_file skip, what the other files hold."""
    for number, text in enumerate(TEXTS):
        written(tmp_path / "corpus", f"good/{number}.txt", f"good {text}".encode())
    for number, data in enumerate(damaged(name, times=1)):
        written(tmp_path / "corpus", name, data)
        for bad_files in ("error", "skip"):
            output = tmp_path / f"out-{number}-{bad_files}"
            config = PrepareConfig(
                corpus=str(tmp_path / "corpus"),
                output=str(output),
                tokenizer=tokenizer,
                on_bad_file=bad_files,
                val_documents=["good/1*.txt"],
                progress=False,
                workers=1,
            )
            message = None
            try:
                prepare(config)
            except UserError as error:
                message = str(error)
            if message is not None:
                assert bad_files == "error"
                assert name in message
                assert not output.exists()
                continue
            manifest = Manifest.load(output)
            for split in manifest.splits:
                verify_shards(manifest, split, level="sha256")
            assert sum(split.documents for split in manifest.splits.values()) >= len(TEXTS)
            assert json.loads((output / MANIFEST_FILE).read_bytes())["preparation"]["files"]["read"]
