"""A task from rows to answers, as a user runs it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dualroute.cli import main, parse_stage
from dualroute.model import ModelConfig
from dualroute.model.checkpoint.format import find_checkpoint, list_checkpoints, load_model
from dualroute.training.monitoring.metrics_log import read_metrics
from tests.tasks.made import MOODS, finetune, reviews, write_jsonl, write_tsv


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tsv(tmp_path_factory.mktemp("rows") / "reviews.tsv", reviews(400))


@pytest.fixture(scope="module")
def trained(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    assert finetune(rows, output, *MOODS, "--train.epochs", "3") == 0
    return output


def test_the_metric_rises_and_the_checkpoint_says_what_it_learnt(trained: Path) -> None:
    validations = read_metrics(trained / "metrics.jsonl", "validation")
    assert validations[0]["val/accuracy"] < 0.8 < 0.95 < validations[-1]["val/accuracy"]
    assert "val/bits_per_byte" not in validations[0]
    checkpoint = find_checkpoint(trained)
    config = ModelConfig.from_file(checkpoint.folder / "model.json")
    assert config.task_head is not None
    assert config.task_head.labels == ["negative", "positive"]
    said = json.loads((checkpoint.folder / "task.json").read_text(encoding="utf-8"))
    assert said["task"]["columns"] == {"text": "review", "label": "mood"}
    score = checkpoint.metadata["score"]
    assert score["name"] == "accuracy"
    assert score["higher_is_better"]
    assert checkpoint.metadata["operation"] == "finetune"


def test_best_is_the_checkpoint_of_the_highest_metric(trained: Path) -> None:
    scores = {
        c.folder.name: c.metadata.get("score", {}).get("value", -1)
        for c in list_checkpoints(trained / "checkpoints")
    }
    best = (trained / "checkpoints" / "best").resolve().name
    assert scores[best] == max(scores.values())


def test_a_run_that_was_cut_in_two_is_the_run(rows: Path, trained: Path, tmp_path: Path) -> None:
    whole = {line["step"]: line["train/loss"] for line in read_metrics(trained / "metrics.jsonl", "train")}
    output = tmp_path / "run"
    last = max(whole)
    # the same length, so that the learning rate is the same: the end of the first part is thrown away
    shutil.copytree(trained, output, symlinks=True)
    for checkpoint in list_checkpoints(output / "checkpoints")[1:]:
        shutil.rmtree(checkpoint.folder)
    for link in ("last", "best"):
        (output / "checkpoints" / link).unlink(missing_ok=True)
    first = list_checkpoints(output / "checkpoints")[0].step
    assert first < last
    # another micro-batch: the same examples, otherwise divided
    assert finetune(rows, output, *MOODS, "--train.epochs", "3", "--train.micro_batch", "4") == 0
    again = {line["step"]: line["train/loss"] for line in read_metrics(output / "metrics.jsonl", "train")}
    assert sorted(again) == sorted(whole)
    assert [again[step] for step in whole] == pytest.approx([whole[step] for step in whole], rel=2e-4)


def test_a_resumed_run_outlives_the_checkpoint_that_it_began_with(rows: Path, tmp_path: Path) -> None:
    """It takes its tokenizer from there, and writes it after checkpoint.keep_last has removed that one."""
    words = [*MOODS, "--train.max_steps", "6", "--checkpoint.every_steps", "1", "--checkpoint.keep_last", "1"]
    output = tmp_path / "run"
    assert finetune(rows, output, *words, "--checkpoint.keep_last", "9") == 0
    for checkpoint in list_checkpoints(output / "checkpoints"):
        if checkpoint.step > 1:
            shutil.rmtree(checkpoint.folder)
    for name in ("last", "best"):
        (output / "checkpoints" / name).unlink(missing_ok=True)
    assert finetune(rows, output, *words) == 0
    steps = [checkpoint.step for checkpoint in list_checkpoints(output / "checkpoints")]
    assert 6 in steps
    assert 1 not in steps
    assert (output / "checkpoints" / "step-00000006" / "tokenizer.model").is_file()


def test_rows_are_answered_in_order_with_their_columns(trained: Path, tmp_path: Path) -> None:
    asked = reviews(30, seed=9)
    source = write_jsonl(
        tmp_path / "asked.jsonl", [{"id": row["id"], "review": row["review"], "more": [1]} for row in asked]
    )
    with source.open("a", encoding="utf-8") as stream:
        stream.write('{"id": 99, "review": "  ", "more": []}\n')
    output = tmp_path / "answers.jsonl"
    arguments = ["predict", "--checkpoint", str(trained), "--input", str(source), "--output", str(output)]
    assert main(arguments) == 0
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == [*(row["id"] for row in asked), 99]
    assert lines[0]["more"] == [1]
    right = sum(line["prediction"] == row["mood"] for line, row in zip(lines, asked, strict=False))
    assert right >= 28
    assert lines[-1] == {"id": 99, "review": "  ", "more": [], "problem": "empty review"}
    assert not list(tmp_path.glob("*.partial*"))
    assert main(arguments) == 2  # it is there


def test_a_prediction_goes_on_after_its_last_whole_line(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dualroute.tasks import answer, predict

    monkeypatch.setattr(answer, "ROWS_AT_ONCE", 8)
    source = write_jsonl(tmp_path / "asked.jsonl", [{"review": row["review"]} for row in reviews(40, seed=5)])
    output = tmp_path / "answers.jsonl"
    arguments = ["predict", "--checkpoint", str(trained), "--input", str(source)]
    assert main([*arguments, "--output", str(tmp_path / "whole.jsonl")]) == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()

    line = predict._line
    seen = []

    def dies(found: answer.Answer) -> dict:  # type: ignore[type-arg]
        seen.append(found)
        if len(seen) == 12:
            raise KeyboardInterrupt
        return line(found)

    monkeypatch.setattr(predict, "_line", dies)
    with pytest.raises(BaseException):  # noqa: B017
        predict.predict_command(predict.PredictConfig(str(trained), str(source), str(output)))
    partial = tmp_path / "answers.jsonl.partial"
    with partial.open("ab") as stream:
        stream.write(b'{"review": "cut sh')
    monkeypatch.setattr(predict, "_line", line)
    answered = []
    encode = answer.Answerer._answers
    monkeypatch.setattr(
        answer.Answerer, "_answers", lambda self, rows: answered.extend(rows) or encode(self, rows)
    )
    assert main([*arguments, "--output", str(output)]) == 0
    assert output.read_bytes() == whole
    assert len(answered) == 29  # 11 were there


def test_a_column_that_a_row_has_already_is_never_written_over(trained: Path, tmp_path: Path) -> None:
    rows = [{"review": "fine"}, {"review": "fine", "prediction": "mine", "prediction_": 2}]
    source = write_jsonl(tmp_path / "asked.jsonl", [*rows, {"review": " ", "problem": "old"}])
    output = tmp_path / "out.jsonl"
    arguments = ["predict", "--checkpoint", str(trained), "--input", str(source), "--output", str(output)]
    assert main(arguments) == 0
    first, second, third = (json.loads(line) for line in output.read_text(encoding="utf-8").splitlines())
    assert (second["prediction"], second["prediction_"]) == ("mine", 2)
    assert second["prediction__"] == first["prediction"]
    assert third == {"review": " ", "problem": "old", "problem_": "empty review"}


def test_another_input_does_not_go_on_with_the_rest_of_an_old_one(trained: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "asked.jsonl", [{"review": "fine"}])
    (tmp_path / "out.jsonl.partial").write_text("{}\n", encoding="utf-8")
    (tmp_path / "out.jsonl.partial.json").write_text('{"weights": "other"}', encoding="utf-8")
    arguments = ["predict", "--checkpoint", str(trained), "--input", str(source)]
    assert main([*arguments, "--output", str(tmp_path / "out.jsonl")]) == 2


def test_evaluation_measures_what_the_validation_measured(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "score.json"
    assert main(["evaluate", "--checkpoint", str(trained), "--output", str(output)]) == 0
    assert "accuracy" in capsys.readouterr().out
    figures = json.loads(output.read_text(encoding="utf-8"))
    best = find_checkpoint(trained / "checkpoints" / "best")
    assert figures["metrics"]["accuracy"] == pytest.approx(best.metadata["score"]["value"], abs=0.03)


@pytest.mark.slow
def test_a_language_model_becomes_one_of_a_task_and_back(
    rows: Path, tiny_dataset: Path, trained: Path, tmp_path: Path
) -> None:
    small = (
        "--model.dim 32 --model.num_layers 1 --model.num_heads 4 --model.tie_embeddings false "
        "--data.context 64 --train.micro_batch 2 --train.tokens_per_batch 512 --train.max_steps 4 "
        "--optim.warmup_steps 1 --monitor.sample_every_steps 0 --monitor.peak_tflops 0.1"
    ).split()
    lm = tmp_path / "lm"
    assert main(["pretrain", *small, "--data.path", str(tiny_dataset), "--output", str(lm)]) == 0
    task = tmp_path / "task"
    run = [
        *("finetune", "--init_from", str(lm), "--data.path", str(rows), "--output", str(task), *MOODS),
        *("--data.context", "64", "--train.micro_batch", "2", "--train.tokens_per_batch", "512"),
        *("--train.max_steps", "2", "--optim.warmup_steps", "1", "--optim.lr", "1e-9"),
        *("--monitor.peak_tflops", "0.1"),
    ]
    assert main(run) == 0
    theirs, ours = load_model(find_checkpoint(lm)), load_model(find_checkpoint(task))
    assert torch.allclose(ours.embedding.weight, theirs.embedding.weight, atol=1e-6)
    assert ours.task_head is not None
    assert "head.weight" not in dict(ours.named_parameters())
    assert (find_checkpoint(task).folder / "tokenizer.model").read_bytes() == (
        find_checkpoint(lm).folder / "tokenizer.model"
    ).read_bytes()
    assert find_checkpoint(task).metadata["lineage"]
    # another task keeps the body, the same labels keep the head
    again = tmp_path / "again"
    assert main([*run[:2], str(task), *run[3:6], str(again), *run[7:]]) == 0
    head = load_model(find_checkpoint(again)).task_head
    assert head is not None
    assert torch.allclose(head.project.weight, ours.task_head.project.weight, atol=1e-6)
    back = tmp_path / "back"
    more = ["--init_from", str(task), "--data.path", str(tiny_dataset), "--output", str(back)]
    options = [
        word
        for k, word in enumerate(small)
        if not (small[k - 1] + word).count("--model") and not word.startswith("--model")
    ]
    assert main(["pretrain", *options, *more]) == 0
    assert load_model(find_checkpoint(back)).task_head is None


def test_what_is_made_of_a_tasks_model_keeps_its_task(trained: Path, tmp_path: Path) -> None:
    smaller = tmp_path / "int8"
    assert main(["quantize", "--checkpoint", str(trained), "--output", str(smaller)]) == 0
    source = write_jsonl(tmp_path / "asked.jsonl", reviews(20, seed=3))
    output = tmp_path / "out.jsonl"
    assert (
        main(["predict", "--checkpoint", str(smaller), "--input", str(source), "--output", str(output)]) == 0
    )
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert sum(line["prediction"] == line["mood"] for line in lines) >= 18


def test_an_exported_checkpoint_answers_alike(trained: Path, tmp_path: Path) -> None:
    best = (trained / "checkpoints" / "best").resolve()
    exported = tmp_path / "exported"
    assert main(["checkpoint", "export", str(best), "--output", str(exported)]) == 0
    source = write_jsonl(tmp_path / "asked.jsonl", [{"review": row["review"]} for row in reviews(10, seed=4)])
    for name, folder in (("one", trained), ("two", exported)):
        arguments = ["--input", str(source), "--output", str(tmp_path / name)]
        assert main(["predict", "--checkpoint", str(folder), *arguments]) == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_class_may_begin_its_sections_with_values_of_its_own() -> None:
    config = parse_stage("finetune", ["--data.path", "rows.csv", "--optim.lr", "0.01"])
    assert (config.train.tokens_per_batch, config.optim.warmup_steps, config.optim.lr) == (2048, 0, 0.01)
    assert parse_stage("pretrain", ["--optim.lr", "0.01"]).optim.warmup_steps == 100
