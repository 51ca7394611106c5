"""What users give by mistake: one line names it; never a traceback, never trained on in silence."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.made import MOODS, finetune, reviews, write_jsonl

ROWS = reviews(60)


def changed(**changes: Any) -> list[dict[str, Any]]:
    return [{**row, **changes} for row in ROWS]


REFUSED = {
    "wrong column": (
        ROWS,
        ("--task.columns", "{text: txt, label: mood}"),
        "no column 'txt'.*'id', 'review', 'mood'",
    ),
    "unknown role": (ROWS, ("--task.columns", "{textt: review, label: mood}"), "did you mean text"),
    "one column twice": (
        ROWS,
        ("--task.columns", "{text: mood, label: mood}"),
        "'mood' is read as text and as label",
    ),
    "one class": (changed(mood="positive"), MOODS, "have one, 'positive' of the labels"),
    "no labels": (changed(mood=None), MOODS, "have none of the labels"),
    "a number for each": (
        [{**row, "mood": k} for k, row in enumerate(ROWS)],
        MOODS,
        "different labels.*task.kind number",
    ),
    "missing labels": ([*ROWS, *changed(mood="")], MOODS, r"\d\d of 1\d\d rows cannot be used.*no mood"),
    "empty texts": ([*ROWS, *changed(review=" ")], MOODS, "rows cannot be used.*empty review"),
    "no such kind": (ROWS, ("--task.kind", "tokens"), "did you mean token"),
    "no such metric": (ROWS, (*MOODS, "--task.metric", "bleu"), "task.metric is bleu.*accuracy"),
    "longer than a window": (
        ROWS,
        (*MOODS, "--data.max_length", "65"),
        "max_length 65 is above data.context 64",
    ),
    "too long": (ROWS, (*MOODS, "--data.max_length", "8", "--data.too_long", "refuse"), "more than the 8"),
    "nothing fits": (
        ROWS,
        (*MOODS, "--data.max_length", "8", "--data.too_long", "drop", "--data.max_bad_rows", "1"),
        "no row that can be used",
    ),
    "two ranks a text": (ROWS, (*MOODS, "--parallel.sequence_parallel", "2"), "parallel.sequence_parallel"),
    "no budget": (ROWS, (*MOODS, "--train.epochs", "null"), "train.epochs"),
    "no validation": (ROWS[:2], (*MOODS, "--data.validation_share", "0.001"), "has no rows to use"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_data_that_cannot_be_meant_are_refused_by_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, options, message = REFUSED[name]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert finetune(data, tmp_path / "run", "--train.epochs", "1", *options) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    line = next(line for line in said.splitlines() if "error:" in line)
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_what_is_left_out_and_what_is_cut_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        *reviews(300),
        {"id": 1, "review": "x", "mood": None},
        {"id": 2, "review": "word " * 80, "mood": "positive"},
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    with data.open("a", encoding="utf-8") as stream:
        stream.write("nonsense\n")
    assert finetune(data, tmp_path / "run", *MOODS, "--train.max_steps", "4") == 0
    assert "1 of " in caplog.text
    assert "no JSON" in caplog.text
    assert "examples truncated to 64 tokens (data.max_length, data.too_long): 1" in caplog.text
    assert "no JSON" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")


def test_a_label_that_stands_in_its_own_text_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**row, "review": f"{row['review']} ({row['mood']})"} for row in ROWS]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert finetune(data, tmp_path / "run", *MOODS, "--train.max_steps", "4") == 0
    assert "stands in its own text" in caplog.text


def test_a_label_of_the_validation_that_training_does_not_have_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    other = write_jsonl(tmp_path / "val.jsonl", [*reviews(200, seed=2), {**ROWS[0], "mood": "mixed"}])
    options = (*MOODS, "--data.validation", str(other), "--train.max_steps", "4")
    assert finetune(data, tmp_path / "run", *options) == 0
    assert "1 of 201 rows are left out: mood that the training rows do not have" in caplog.text


@pytest.mark.parametrize("key", ["vocab_size", "tokenizer"])
def test_a_kind_that_reads_no_text_refuses_what_is_about_a_tokenizer(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "events.csv"
    data.write_text("user,item,time\n" + "".join(f"{k % 5},{k % 7},{k}\n" for k in range(60)))
    assert (
        finetune(data, tmp_path / "run", "--task.kind", "item", "--train.epochs", "1", f"--data.{key}", "300")
        == 2
    )
    assert f"data.{key} has no meaning for a task of kind item" in capsys.readouterr().err
