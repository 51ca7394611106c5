"""The main job as the quickstart runs it, command after command, on a small corpus."""

import gzip
import json

import pytest

from dualroute.cli import main
from dualroute.training.monitoring.metrics_log import read_metrics
from tests.conftest import write_corpus
from tests.training.step.test_module import SMALL

pytestmark = pytest.mark.slow


def run(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def main_job(capsys, corpus, folder, *, prepare=(), steps=30):
    data, output = folder / "data", folder / "run"
    run(capsys, "prepare", "--corpus", corpus, "--output", data, "--progress", "false", *prepare)
    run(
        capsys, "pretrain", *SMALL, "--data.path", data, "--output", output, "--train.max_steps", steps
    )  # fmt: skip
    figures = folder / "figures.json"
    run(capsys, "evaluate", "--checkpoint", output, "--data", data, "--output", figures)
    page = run(capsys, "report", "--run", output, "--prompt", "The old", "--sample_tokens", "20")
    text = run(capsys, "generate", "--checkpoint", output, "--prompt", "The old")
    return output, json.loads(figures.read_text()), page, text


def test_text_becomes_a_model_that_writes(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", 60)
    options = ["--vocab_size", "320", "--reserved_tokens", "0", "--val_fraction", "0.1"]
    output, figures, page, text = main_job(capsys, corpus, tmp_path, prepare=options)
    validation = read_metrics(output / "metrics.jsonl", "validation")
    assert validation[0]["step"] == 0
    assert validation[-1]["val/bits_per_byte"] < 0.7 * validation[0]["val/bits_per_byte"]
    # all held-out text, of which the run itself measured the beginning
    assert figures["loss"] == pytest.approx(validation[-1]["val/loss"], abs=0.3)
    assert text.startswith("The old")
    written = (output / "report.md").read_text()
    for fact in ("parameters", "bits per byte", "tokens/s", str(output / "tensorboard"), "The old"):
        assert fact in written
    assert "validation loss" in page


def test_real_text_learns_too(tmp_path, capsys, real_data):
    plays = tmp_path / "plays"
    plays.mkdir()
    text = gzip.decompress((real_data / "tinyshakespeare" / "input.txt.gz").read_bytes()).decode()
    third = len(text) // 3
    for number in range(3):
        (plays / f"part-{number}.txt").write_text(text[number * third : (number + 1) * third])
    options = ["--vocab_size", "512", "--val_documents", '["part-2*"]']
    output, figures, _, _ = main_job(capsys, plays, tmp_path, prepare=options)
    validation = read_metrics(output / "metrics.jsonl", "validation")
    assert validation[-1]["val/loss"] < validation[0]["val/loss"] - 1
    assert figures["bits_per_byte"] < 0.8 * validation[0]["val/bits_per_byte"]
