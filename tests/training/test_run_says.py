"""What a run tells at its start and its end, and what it refuses to do without a word."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dualroute.attention import backend
from dualroute.cli import main, parse_stage
from dualroute.data.manifest import Manifest
from dualroute.model.checkpoint.format import find_checkpoint
from dualroute.training.monitoring import summary
from dualroute.training.monitoring.metrics_log import read_metrics
from dualroute.training.prepare import check
from tests.training.checkpointing.test_resumed_settings import arguments


@pytest.fixture
def told() -> Iterator[list[str]]:
    """Lines of the project's log."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.getMessage()}")

    handler, logger = Keep(), logging.getLogger("dualroute")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture
def chosen_backend() -> Iterator[None]:
    yield
    backend.set_backend("auto")


@pytest.fixture(scope="module")
def finished(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("says") / "run"
    assert main(arguments(tiny_dataset, output, 6)) == 0
    return output


def test_the_first_lines_say_what_is_trained_and_the_last_what_to_do_next(
    tiny_dataset: Path, tmp_path: Path, told: list[str]
) -> None:
    run = tmp_path / "run"
    assert main(arguments(tiny_dataset, run, 8)) == 0
    lines = read_metrics(run / "metrics.jsonl", "train")
    took = {line["step"] for line in lines if "speed/checkpoint_time" in line}
    assert took == {5}, "in the line after the checkpoint of step 4"
    first, second, *_, done, then = [line for line in told if line.startswith("INFO")]
    for words in (
        "pretrain: ",
        "parameters (dual attention, 2 layers of width 32)",
        "4,096 tokens in 8 steps",
    ):
        assert words in first
    assert f"epochs of {tiny_dataset}" in first
    for words in (
        "on 1 rank(s), CPU, precision 32 (float32 products: highest), attention: ",
        f"output {run}",
    ):
        assert words in second
    assert str(find_checkpoint(run).folder) in done
    assert "validation loss" in done
    assert f'dualroute generate --checkpoint {run} --prompt "…"' in then
    assert f"dualroute evaluate --checkpoint {run} --data {tiny_dataset}" in then
    assert not [line for line in told if line.startswith("WARNING")]


def test_epochs_are_counted_and_many_are_warned_of(
    finished: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    lines = {line["step"]: line for line in read_metrics(finished / "metrics.jsonl", "train")}
    tokens = Manifest.load(tiny_dataset).split("train").tokens
    for step in (1, 6):
        assert lines[step]["train/epoch"] == pytest.approx(step * 512 / tokens, rel=0.01)
    steps_per_epoch = 1 / lines[1]["train/epoch"]
    for passes, words in ((3.5, []), (10, ["the training text is read"])):
        stage, *options = arguments(tiny_dataset, tmp_path / "run", round(passes * steps_per_epoch))
        prepared = check(parse_stage(stage, options))
        config, data, world, count = prepared.config, prepared.data, prepared.world, prepared.token_count
        found = list(summary.warnings_at_start(config, data, world, count, None))
        assert len(found) == len(words)
        assert all(word in line for word, line in zip(words, found, strict=True))


def test_settings_of_deepspeed_are_not_dropped_in_silence(
    finished: Path, tiny_dataset: Path, tmp_path: Path, told: list[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    more = ["--parallel.zero_stage", "2", "--parallel.offload_optimizer", "true"]
    more += ["--train.recompute_every_layers", "2"]
    assert main(arguments(tiny_dataset, run, 7, *more)) == 0
    line, other = [line for line in told if "no effect" in line]
    assert "train.recompute_every_layers 2 has no effect" in other
    assert "parallel.zero_stage 2, parallel.offload_optimizer True have no effect" in line
    assert "--parallel.strategy deepspeed" in line


def test_extending_a_finished_run_says_that_the_learning_rate_rises(
    finished: Path, tiny_dataset: Path, tmp_path: Path, told: list[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    assert main(arguments(tiny_dataset, run, 12)) == 0
    (line,) = [line for line in told if line.startswith("WARNING") and "learning rate" in line]
    assert "train.max_steps was 6 and is 12" in line
    assert "optim.schedule wsd" in line


@pytest.mark.parametrize("way", ["configuration", "environment"])
def test_the_attention_back_end_is_a_setting_and_is_written_down(
    way: str, finished: Path, tiny_dataset: Path, tmp_path: Path, told: list[str],
    monkeypatch: pytest.MonkeyPatch, chosen_backend: None,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    if way == "environment":
        monkeypatch.setenv(backend.VARIABLE, "torch")
    more = ["--train.kernels", "torch" if way == "configuration" else "auto"]
    assert main(arguments(tiny_dataset, run, 7, *more)) == 0
    text = (run / "config.yaml").read_text()
    assert yaml.safe_load(text)["train"]["kernels"] == "torch"
    assert text.startswith("# attention: plain torch")
    assert any("attention: plain torch" in line for line in told)


def test_a_back_end_that_is_not_here_is_refused(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(backend.VARIABLE, "cutlass")
    assert main(arguments(tiny_dataset, tmp_path / "run", 7)) == 2
    error = capsys.readouterr().err
    assert "DUALROUTE_KERNELS is cutlass" in error
    assert len(error.strip().splitlines()) == 1


def test_forgotten_srun_is_refused_before_anything_is_written(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "train"}.items():
        monkeypatch.setenv(name, value)
    assert main(arguments(tiny_dataset, tmp_path / "run", 7)) == 2
    assert "this job has 8 tasks" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
