"""A suite during a training: the figures are those of the command on the checkpoint of that step."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dualroute.cli import main
from dualroute.errors import UserError
from dualroute.training.config import MonitorConfig
from dualroute.training.monitoring.metrics_log import read_metrics

TRAINING = (
    "--model.dim 16 --model.num_layers 1 --model.num_heads 2 --model.window 8 --model.block 16 "
    "--data.context 32 "
    "--train.micro_batch 2 --train.tokens_per_batch 64 --train.max_steps 4 --optim.warmup_steps 1 "
    "--data.val_tokens 200 --checkpoint.every_steps 2 --monitor.sample_every_steps 0 "
    "--monitor.router_statistics_every 0 --monitor.peak_tflops 0.1 --monitor.evaluate_every_steps 2"
).split()


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "text.txt").write_text("The old bird sees the river.\n" * 30)
    path = tmp_path / "suite.yaml"
    path.write_text("parts: [{part: perplexity, text: [./text.txt], stride: 16}]")
    return path


def test_the_figures_are_those_of_the_command(tiny_dataset, suite, tmp_path):
    run = tmp_path / "run"
    words = ["--data.path", str(tiny_dataset), "--output", str(run), "--monitor.evaluate_suite", str(suite)]
    assert main(["pretrain", *TRAINING, *words]) == 0
    lines = read_metrics(run / "metrics.jsonl", "evaluation")
    assert [line["step"] for line in lines] == [2, 4]
    tag = "eval/perplexity/text.txt/bits_per_byte"
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [round(one.value, 5) for one in board.Scalars(tag)] == [round(line[tag], 5) for line in lines]
    for line in lines:
        output = tmp_path / f"{line['step']}.json"
        checkpoint = run / "checkpoints" / f"step-{line['step']:08d}"
        assert (
            main(
                ["evaluate", "--checkpoint", str(checkpoint), "--suite", str(suite), "--output", str(output)]
            )
            == 0
        )
        cell = json.loads(output.read_text())["cells"]["perplexity/text.txt"]
        for score in cell["scores"]:
            assert line[f"eval/perplexity/text.txt/{score['metric']}"] == pytest.approx(
                score["value"], rel=1e-5
            )
        assert line[f"{tag}_stderr"] > 0


def test_a_suite_that_does_not_fit_is_refused_before_the_first_step(tiny_dataset, suite, tmp_path, capsys):
    suite.write_text("parts: [{part: ruler, lengths: [4096]}]")
    words = ["--data.path", str(tiny_dataset), "--output", str(tmp_path / "run")]
    assert main(["pretrain", *TRAINING, *words, "--monitor.evaluate_suite", str(suite)]) == 2
    assert "part ruler: lengths 4096 do not fit" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_steps_without_a_suite_are_refused():
    with pytest.raises(UserError, match=r"monitor\.evaluate_suite names no suite"):
        MonitorConfig(evaluate_every_steps=5)
