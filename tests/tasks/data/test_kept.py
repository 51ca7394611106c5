"""Encoded examples in files: the same run, encoded once, never a stale or damaged one."""

import json
import os
import pickle
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualroute.cli import main, parse_stage
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import save_model
from dualroute.tasks.config import FinetuneConfig
from dualroute.tasks.data import kept
from dualroute.tasks.data.examples import Example
from dualroute.tasks.data.module import TaskDataModule
from dualroute.tasks.run import check
from dualroute.training.monitoring.metrics_log import read_metrics
from dualroute.training.prepare import Prepared
from tests.tasks.made import MOODS, SMALL, reviews, write_jsonl

TOKENIZER = "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that stays, where a start from scratch would train its own from the rows."""
    from dualroute.tasks.data.tokenizers import trained

    path = tmp_path_factory.mktemp("tokenizer") / TOKENIZER
    path.write_bytes(trained((row["review"] for row in reviews(400)), 340))
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "reviews.jsonl", reviews(120))


def config(rows: Path, tokenizer: Path, output: Path, *more: str) -> FinetuneConfig:
    small = [word for word in SMALL if word not in ("--data.vocab_size", "340")]
    words = [*small, *MOODS, "--data.path", str(rows), "--data.tokenizer", str(tokenizer)]
    return parse_stage("finetune", [*words, "--output", str(output), "--train.max_steps", "4", *more])


def place(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if path.is_dir())
    return found


def said(prepared: Prepared) -> list[str]:
    return [line for _, line in prepared.remarks]


def module(prepared: Prepared) -> TaskDataModule:
    assert isinstance(prepared.data, TaskDataModule)
    return prepared.data


def same(one: TaskDataModule, other: TaskDataModule) -> None:
    """Fingerprints, windows and order."""
    assert one.fingerprint == other.fingerprint
    assert one.val_fingerprint == other.val_fingerprint
    for name in ("lengths", "targets", "rows"):
        np.testing.assert_array_equal(getattr(one.train, name), getattr(other.train, name))
    for number in range(3):
        theirs = other.train_windows()[number]
        for name, values in one.train_windows()[number].items():
            np.testing.assert_array_equal(values, theirs[name])
            assert values.dtype == theirs[name].dtype


@pytest.mark.parametrize("divided", [True, False], ids=["share", "validation"])
def test_the_examples_are_those_of_memory_and_the_next_start_reads_no_rows(
    divided: bool, rows: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [] if divided else ["--data.validation", str(write_jsonl(tmp_path / "v.jsonl", reviews(20, 1)))]
    with rows.open("a") as stream:
        stream.write('{"review": "", "mood": "positive"}\n')  # left out, and counted
    held = check(config(rows, tokenizer, tmp_path / "run", *more))
    keeping = config(rows, tokenizer, tmp_path / "run", *more, "--data.encoded", str(tmp_path / "kept"))
    first = check(keeping)
    same(module(held), module(first))
    assert [line for line in said(first) if not line.startswith("kept in ")] == said(held)
    assert any("1 of 1" in line and "empty review" in line for line in said(first))
    folder = place(tmp_path / "kept")
    assert f"kept in {folder}" in said(first)

    def refused(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("training rows are encoded again")

    monkeypatch.setattr("dualroute.tasks.training_rows.encoded_rows", refused)
    again = check(keeping)
    same(module(held), module(again))
    assert [line.replace("read in", "kept in") for line in said(again)] == said(first)
    assert f"read in {folder}" in said(again)
    # nothing of the arrays is in this process
    assert all(isinstance(values, np.memmap) for values in module(again).train.fields.values())


def test_a_run_goes_on_with_kept_examples(rows: Path, tokenizer: Path, tmp_path: Path) -> None:
    def run(output: Path, *more: str) -> dict[int, float]:
        small = [word for word in SMALL if word not in ("--data.vocab_size", "340")]
        words = [*small, *MOODS, "--data.path", str(rows), "--data.tokenizer", str(tokenizer), *more]
        assert main(["finetune", *words, "--checkpoint.every_steps", "3", "--output", str(output)]) == 0
        return {line["step"]: line["train/loss"] for line in read_metrics(output / "metrics.jsonl", "train")}

    whole = run(tmp_path / "whole", "--train.max_steps", "6")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", symlinks=True)
    checkpoints = tmp_path / "cut" / "checkpoints"
    for path in sorted(checkpoints.iterdir()):
        if path.name != "step-00000003":
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
    more = ("--data.encoded", str(tmp_path / "kept"), "--data.num_workers", "1")
    assert run(tmp_path / "cut", "--train.max_steps", "6", *more) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    "change",
    ["rows", "length", "tokenizer", "direction", "share"],
)
def test_other_examples_are_kept_beside(change: str, rows: Path, tokenizer: Path, tmp_path: Path) -> None:
    keep = ("--data.encoded", str(tmp_path / "kept"))
    before = module(check(config(rows, tokenizer, tmp_path / "run", *keep)))
    more: tuple[str, ...] = ()
    if change == "rows":
        write_jsonl(rows, reviews(121))
    elif change == "tokenizer":
        (tmp_path / "beside").mkdir()
        shutil.copy(tokenizer, tmp_path / "beside" / TOKENIZER)
        tokenizer = tmp_path / "beside" / TOKENIZER
        (tmp_path / "beside" / "tokenizer_config.json").write_text('{"eos_token": "<pad>"}')
    else:
        changes = {
            "length": ("--data.max_length", "8"),
            "direction": ("--model.causal", "false"),
            "share": ("--data.validation_share", "0.3"),
        }
        more = changes[change]
    after = module(check(config(rows, tokenizer, tmp_path / "run", *keep, *more)))
    assert len([path for path in (tmp_path / "kept").iterdir() if path.is_dir()]) == 2
    plain = module(check(config(rows, tokenizer, tmp_path / "run", *more)))
    same(plain, after)
    assert (before.fingerprint != after.fingerprint) == (change != "tokenizer")


def test_what_decides_no_example_keeps_none_anew(rows: Path, tokenizer: Path, tmp_path: Path) -> None:
    keep = ("--data.encoded", str(tmp_path / "kept"))
    check(config(rows, tokenizer, tmp_path / "run", *keep))
    more = ("--task.metric", "macro_f1", "--task.label_smoothing", "0.1", "--seed", "3", "--optim.lr", "0.1")
    assert f"read in {place(tmp_path / 'kept')}" in said(
        check(config(rows, tokenizer, tmp_path / "r", *keep, *more))
    )


@pytest.mark.parametrize("damage", ["byte", "cut", "note", "told", "rows", "gone"])
def test_damaged_ones_are_encoded_again(damage: str, rows: Path, tokenizer: Path, tmp_path: Path) -> None:
    keeping = config(rows, tokenizer, tmp_path / "run", "--data.encoded", str(tmp_path / "kept"))
    first = module(check(keeping))
    fingerprint, folder = first.fingerprint, place(tmp_path / "kept")
    path = folder / "field-input_ids.bin"
    data = path.read_bytes()
    if damage == "byte":
        path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    elif damage == "cut":
        path.write_bytes(data[:-4])
    elif damage == "note":
        (folder / "examples.json").write_text('{"format": 7')
    elif damage == "told":
        note = (folder / "examples.json").read_text()
        (folder / "examples.json").write_text(
            note.replace('"negative", "positive"', '"positive", "negative"')
        )
    elif damage == "rows":
        (folder / "rows.bin").write_bytes((folder / "rows.bin").read_bytes()[::-1])
    else:
        path.unlink()
    again = check(keeping)
    assert f"kept in {folder}" in said(again)
    assert module(again).fingerprint == fingerprint
    assert path.read_bytes() == data


def test_what_fitting_has_found_comes_back(rows: Path, tokenizer: Path, tmp_path: Path) -> None:
    more = ("--task.class_weights", "balanced", "--data.encoded", str(tmp_path / "kept"))
    held = check(config(rows, tokenizer, tmp_path / "run", *more[:2]))
    for _ in range(2):
        prepared = check(config(rows, tokenizer, tmp_path / "run", *more))
        assert prepared.extra_files == held.extra_files  # labels and all else that a checkpoint says
        kinds = [one.make_module(one).kind for one in (held, prepared)]  # type: ignore[attr-defined]
        assert kinds[0].class_weights == kinds[1].class_weights
        assert kinds[1].class_weights is not None


def test_bad_rows_are_refused_as_from_memory(rows: Path, tokenizer: Path, tmp_path: Path) -> None:
    keep = ("--data.encoded", str(tmp_path / "kept"))
    with rows.open("a") as stream:
        stream.write('{"review": "", "mood": "positive"}\n')
    check(config(rows, tokenizer, tmp_path / "run", *keep))
    for more in ((), keep):  # of examples that are there already, too
        with pytest.raises(UserError, match=r"1 of 1.. rows cannot be used, first of all: empty review"):
            check(config(rows, tokenizer, tmp_path / "run", *more, "--data.max_bad_rows", "0"))
    rows.write_text("no JSON\n" * 40)
    validation = ("--data.validation", str(write_jsonl(tmp_path / "v.jsonl", reviews(20, 1))))
    for more in ((), keep, validation, (*keep, *validation)):
        with pytest.raises(UserError, match=r"40 of 40 rows cannot be used|1 of 1 rows cannot be used"):
            check(config(rows, tokenizer, tmp_path / "run", *more))


def test_images_keep_their_size(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=draw.integers(0, 255, (60, 8, 8), np.uint8), y=np.arange(60) % 2)
    words = ["--task.kind", "image", "--data.path", str(tmp_path / "d.npz"), "--model.causal", "false"]
    words += ["--task.columns", "{image: x, label: y}", "--task.image.patch", "2", "--data.context", "64"]
    words += ["--model.dim", "32", "--model.num_heads", "4", "--model.block", "4", "--model.sub_block", "4"]
    words += ["--model.window", "2", "--output", str(tmp_path / "run"), "--train.max_steps", "4"]
    held = check(parse_stage("finetune", words))
    for _ in range(2):
        prepared = check(parse_stage("finetune", [*words, "--data.encoded", str(tmp_path / "kept")]))
        same(module(held), module(prepared))
        assert prepared.extra_files == held.extra_files


def test_kept_examples_can_be_read_where_nothing_can_be_written(
    rows: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping = config(rows, tokenizer, tmp_path / "run", "--data.encoded", str(tmp_path / "kept"))
    check(keeping)
    monkeypatch.setattr(
        "dualroute.files.locked", lambda *arguments, **options: pytest.fail("a lock is taken")
    )
    assert f"read in {place(tmp_path / 'kept')}" in said(check(keeping))


def test_an_interrupted_encoding_leaves_nothing(
    rows: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping = config(rows, tokenizer, tmp_path / "run", "--data.encoded", str(tmp_path / "kept"))
    with monkeypatch.context() as patch:
        add = kept.ExamplesWriter.add

        def interrupted(self: kept.ExamplesWriter, row: int, example: Example) -> None:
            if self.examples == 20:
                raise KeyboardInterrupt
            add(self, row, example)

        patch.setattr(kept.ExamplesWriter, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            check(keeping)
    assert list((tmp_path / "kept").iterdir()) == []
    assert said(check(keeping))[1] == f"kept in {place(tmp_path / 'kept')}"


def test_one_encodes_and_the_others_wait(tmp_path: Path) -> None:
    """Processes take turns; threads stand for them here, as the lock is that of an open file."""
    made, found = [], []

    def encode(writer: kept.ExamplesWriter) -> dict[str, Any]:
        made.append(1)
        time.sleep(0.1)
        writer.add(0, Example({"input_ids": np.arange(5), "labels": np.arange(5)}))
        return {"a": 1}

    def start() -> None:
        examples, told, _ = kept.kept_examples(tmp_path / "kept", "key", encode)
        found.append((examples.fingerprint(), told))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(made), len(found)) == (1, 4)
    assert all(one == found[0] for one in found)


def test_a_copy_for_another_process_is_no_copy_of_the_arrays(tmp_path: Path) -> None:
    ids = np.arange(50_000, dtype=np.int32)

    def encode(writer: kept.ExamplesWriter) -> dict[str, Any]:
        for number in range(2):
            writer.add(number, Example({"input_ids": ids, "inputs": np.ones((50_000, 2), np.float32)}))
        return {}

    examples, _, made = kept.kept_examples(tmp_path / "kept", "key", encode)
    assert made
    examples.fields["reference"] = np.arange(100_000, dtype=np.float64)[:3]
    data = pickle.dumps(examples)
    assert len(data) < 5_000
    copy = pickle.loads(data)
    assert copy.fingerprint() == examples.fingerprint()
    np.testing.assert_array_equal(copy[1].fields["input_ids"], ids)
    np.testing.assert_array_equal(copy.fields["reference"], examples.fields["reference"])


def test_bad_places_and_kinds_are_refused(rows: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"data\.encoded .*file cannot be written .*: name another folder"):
        check(config(rows, tokenizer, tmp_path / "run", "--data.encoded", str(tmp_path / "file")))
    words = [
        "--data.encoded",
        str(tmp_path / "kept"),
        "--output",
        str(tmp_path / "r"),
        "--data.context",
        "64",
    ]
    words += ["--train.max_steps", "4"]
    events = [{"user": u, "item": i % 7, "time": i} for u in range(30) for i in range(u, u + 5)]
    path = write_jsonl(tmp_path / "events.jsonl", events)
    with pytest.raises(UserError, match=r"data\.encoded has no meaning for a task of kind item"):
        check(parse_stage("finetune", [*words, "--task.kind", "item", "--data.path", str(path)]))
    images = [{"image": [[k] * 8] * 8, "label": k % 2} for k in range(40)]
    path = write_jsonl(tmp_path / "images.jsonl", images)
    with pytest.raises(UserError, match="keeps images and recordings of folders"):
        check(parse_stage("finetune", [*words, "--task.kind", "image", "--data.path", str(path)]))


def test_nothing_but_folders_and_notes_lies_there(rows: Path, tokenizer: Path, tmp_path: Path) -> None:
    check(config(rows, tokenizer, tmp_path / "run", "--data.encoded", str(tmp_path / "kept")))
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [place(tmp_path / "kept").name]
    note = json.loads((place(tmp_path / "kept") / "examples.json").read_text())
    assert sorted(os.listdir(place(tmp_path / "kept"))) == sorted(
        ["examples.json", "lengths.bin", "targets.bin", "rows.bin"]
        + [f"field-{name}.bin" for name in note["fields"]]
    )


WORDS = ["fine", "dull", "warm", "cold", "film", "city", "actors", "story"]
KINDS: dict[str, Any] = {
    "number": lambda k, text: {"text": text, "label": k % 7},
    "token": lambda k, text: {"tokens": text.split(), "tags": ["B-x" if k % 2 else "O"] * 3},
    "span": lambda k, text: {"question": "who?", "context": text, "answers": [text.split()[k % 3]]},
    "text": lambda k, text: {"source": text, "answer": text.split()[0]},
    "chat": lambda k, text: {"prompt": text, "completion": text.split()[1]},
    "preference": lambda k, text: {"prompt": text, "chosen": f"yes {k}", "rejected": f"no {k}"},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_of_every_kind_and_of_several_files(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    texts = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS if len({a, b, c}) == 3][::3]
    rows = [KINDS[kind](number, text) for number, text in enumerate(texts)]
    paths = [write_jsonl(tmp_path / f"{part}.jsonl", rows[part::2]) for part in range(2)]
    more = ["--task.kind", kind, "--data.sources", f"{paths[0]}=0.25", f"{paths[1]}=0.75"]
    more += ["--data.context", "64", "--data.tokenizer", str(tokenizer), "--train.max_steps", "4"]
    more += ["--output", str(tmp_path / "run"), "--model.dim", "32", "--model.num_heads", "4"]
    if kind == "preference":
        start = tmp_path / "start"
        model = DualRoutingTransformer(ModelConfig(vocab_size=340, dim=32, num_layers=1, num_heads=4))
        save_model(model, start, tokenizer, {"step": 1, "context": 64})
        more = [*more, "--init_from", str(start)]
        more = more[: more.index("--data.tokenizer")] + more[more.index("--data.tokenizer") + 2 :]
    held = check(parse_stage("finetune", more))
    for found in ("kept in", "read in"):
        prepared = check(parse_stage("finetune", [*more, "--data.encoded", str(tmp_path / "kept")]))
        assert any(line.startswith(found) for line in said(prepared))
        same(module(held), module(prepared))
        assert module(held).sources == module(prepared).sources
