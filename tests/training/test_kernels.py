"""What `train.kernels auto` comes to in a run: compared on the run's own shapes, logged and written down."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from dualroute.attention import backend
from dualroute.attention.backends.cpp.build import CACHE
from dualroute.cli import main
from dualroute.model import DualRoutingTransformer, ModelConfig, kernel_choice
from dualroute.training import kernels
from dualroute.training.config import DataConfig, ParallelConfig, PretrainConfig, TrainConfig, WatchdogConfig
from dualroute.training.kernels import arithmetic, problems_of_run
from dualroute.training.monitoring.metrics_log import read_metrics
from tests.attention.verification.doubles import no_triton
from tests.training.checkpointing.test_resumed_settings import arguments

SHAPE = {"vocab_size": 16, "dim": 32, "num_layers": 2, "num_heads": 4}


@pytest.fixture
def compared_on_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    backend.load("cpp")  # compiled in the usual cache
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(kernel_choice, "COMPARED", ("cpu",))
    monkeypatch.setattr(backend, "_triton", no_triton)
    yield
    backend.set_backend("auto")


@pytest.mark.usefixtures("compared_on_cpus")
def test_a_run_says_which_kernels_and_why(tiny_dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(arguments(tiny_dataset, run, 6)) == 0
    (kept,) = (tmp_path / "cache").glob("kernels-*.json")
    line = backend.describe("cpu")
    assert "the fastest of what is right here, " in line
    assert "triton not: " in line
    text = (run / "config.yaml").read_text()
    assert text.startswith(f"# {line}\n")
    assert yaml.safe_load(text)["train"]["kernels"] == "auto"
    (logged,) = list(read_metrics(run / "metrics.jsonl", "config"))
    assert logged["config"].startswith(f"# {line}\n")
    assert line in (run / "log.txt").read_text()
    assert kept.stat().st_size > 100


def test_kernels_that_never_end_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(kernels.os, "_exit", ended.append)
    monkeypatch.setattr(kernels, "in_turn", ["torch", "triton"])

    def hang(*given: object) -> None:
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.01)

    monkeypatch.setattr(kernels, "choose_kernels", hang)
    config = PretrainConfig(watchdog=WatchdogConfig(start_minutes=1e-3))
    module = SimpleNamespace(model=torch.nn.Identity())
    kernels.compare_kernels(config, module)  # type: ignore[arg-type]
    assert ended == [2]
    assert "has not ended after 0.001 minutes" in caplog.text
    assert "waits for the triton kernels: choose others, for example DUALROUTE_KERNELS=torch" in caplog.text


def test_the_problems_are_those_of_the_run_and_of_its_teacher() -> None:
    student = DualRoutingTransformer(ModelConfig(**SHAPE, layer_windows=[8, 16]))
    teacher = DualRoutingTransformer(ModelConfig(**{**SHAPE, "dim": 64}, window=8)).bfloat16()
    config = PretrainConfig(
        data=DataConfig(context=96),
        train=TrainConfig(precision="16-mixed"),
        parallel=ParallelConfig(sequence_parallel=2),
    )
    module = SimpleNamespace(model=student)
    found = problems_of_run(config, module)  # type: ignore[arg-type]
    assert [(asked.window, asked.layers, asked.dtype, asked.context) for asked in found] == [
        (8, 1, "float16", 96),
        (16, 1, "float16", 96),
    ]
    assert all(asked.packed and asked.global_heads == 1 for asked in found)
    module.teacher = SimpleNamespace(model=teacher, weight=teacher.head.weight)
    *_, last = problems_of_run(config, module)  # type: ignore[arg-type]
    assert (last.head_dim, last.dtype, last.layers) == (16, "bfloat16", 2)


def test_the_type_of_the_rows_is_that_of_the_precision() -> None:
    kinds = [arithmetic(name) for name in ("32", "16-mixed", "bf16-mixed", "bf16-true")]
    assert kinds == [torch.float32, torch.float16, torch.bfloat16, torch.bfloat16]
