"""What a real, tiny Trainer leaves in TensorBoard and metrics.jsonl."""

from __future__ import annotations

import gzip
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dualroute.errors import UserError
from dualroute.training.config import MonitorConfig
from dualroute.training.monitoring.metrics_log import read_metrics
from dualroute.training.monitoring.monitor import Monitor, perplexity
from dualroute.training.monitoring.throughput import StepClock
from tests.training.monitoring.monitored_module import (
    FLOPS_PER_TOKEN,
    TOKENS_PER_STEP,
    Monitored,
    RoutedLayer,
    fit,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*(num_workers|IterableDataset|sanity|resuming).*")
PEAK = 1e-3  # TFLOP/s


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def monitor(folder: Path | None = None, **values: Any) -> Monitor:
    values = {"log_every_steps": 1, "sample_prompts": ["Once", "too long"], "peak_tflops": PEAK} | values
    return Monitor(MonitorConfig(**values), folder=folder, resolved_config="dim: 8")


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Monitored]:
    """Six steps of two micro-batches each."""
    folder = tmp_path_factory.mktemp("run")
    module = Monitored()
    watch = monitor(router_statistics_every=2, sample_every_steps=4, sample_tokens=5)
    with pytest.warns(UserWarning, match=r"no sample for monitor\.sample_prompts\[1\]: the prompt has 99"):
        fit(module, folder, [watch], steps=6)
    return folder, module


def test_the_loss_curve_is_exact(finished: tuple[Path, Monitored]) -> None:
    folder, module = finished
    lines = read_metrics(folder / "metrics.jsonl", "train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["train/loss"] for line in lines] == module.losses
    assert [line["train/perplexity"] for line in lines] == [math.exp(loss) for loss in module.losses]


def test_every_figure_of_a_step_is_there(finished: tuple[Path, Monitored]) -> None:
    line = read_metrics(finished[0] / "metrics.jsonl", "train")[-1]
    given = {
        "optim/lr": 0.1,
        "optim/grad_norm": 2.0,
        "train/z_loss": 0.01,
        "train/bits_per_byte": 0.7,
        "train/tokens": 6 * TOKENS_PER_STEP,
        "train/skipped_steps": 3,
        "distill/kl": 0.125,
    }
    assert {tag: line[tag] for tag in given} == given
    assert line["speed/step_time"] > 0
    assert 0 <= line["speed/data_wait_share"] < 1
    rate = line["speed/tokens_per_second"]
    assert rate == pytest.approx(TOKENS_PER_STEP / line["speed/step_time"])
    assert line["speed/mfu"] == pytest.approx(rate * FLOPS_PER_TOKEN / (PEAK * 1e12))
    assert line["memory/peak_rss_gib"] > 0.01


def test_tensorboard_shows_the_same_figures_but_for_those_that_never_change(
    finished: tuple[Path, Monitored],
) -> None:
    folder, _ = finished
    shown: dict[tuple[str, int], float] = {}
    board = events(folder)
    for tag in board.Tags()["scalars"]:
        for scalar in board.Scalars(tag):
            assert (tag, scalar.step) not in shown
            shown[tag, scalar.step] = scalar.value
    logged: dict[tuple[str, int], float] = {}
    values: dict[str, set[float]] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        for tag, value in line.items() if line["event"] in ("train", "validation", "router") else ():
            if tag not in ("step", "event"):
                logged[tag, line["step"]] = value
                values.setdefault(tag, set()).add(value)
    still = {tag for tag, of_tag in values.items() if len(of_tag) == 1}
    assert {"optim/lr", "train/skipped_steps", "router/mass_far/mean"} <= still
    assert not still & {"train/loss", "train/perplexity", "val/loss"}
    cards = still & {"val/bits_per_byte", "train/bits_per_byte"}  # these are shown all the same
    moved = {key: value for key, value in logged.items() if key[0] not in still - cards}
    assert set(shown) <= set(moved)
    assert {tag for tag, _ in shown} == {tag for tag, _ in moved}
    assert shown == pytest.approx({key: moved[key] for key in shown}, rel=1e-6)  # TensorBoard holds float32
    # of a curve that began with equal values the ends of that beginning stand for it
    assert {key for key in moved if key[0] in ("train/loss", "val/loss", "train/tokens")} <= set(shown)


def test_validations_stand_at_the_steps_they_follow(finished: tuple[Path, Monitored]) -> None:
    lines = read_metrics(finished[0] / "metrics.jsonl", "validation")
    assert [(line["step"], line["val/loss"]) for line in lines] == [(0, 1.0), (3, 4.0), (6, 7.0)]
    assert [line["val/perplexity"] for line in lines] == [math.exp(1), math.exp(4), math.exp(7)]
    assert {line["val/bits_per_byte"] for line in lines} == {0.5}


def test_router_statistics_come_from_one_micro_batch_of_a_due_step(finished: tuple[Path, Monitored]) -> None:
    folder, module = finished
    lines = read_metrics(folder / "metrics.jsonl", "router")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[0]["router/router_entropy/layer_01"] == lines[0]["router/router_entropy/mean"] == 0.5
    layers = [layer for layer in module.modules() if isinstance(layer, RoutedLayer)]
    assert [layer.collected for layer in layers] == [3, 3]
    assert not any(layer.collect_statistics for layer in layers)


def test_samples_and_configuration_are_text(finished: tuple[Path, Monitored]) -> None:
    folder, module = finished
    assert module.samples_asked == 2 * [("Once", 5, 0), ("too long", 5, 1)]
    lines = read_metrics(folder / "metrics.jsonl", "samples")
    assert [line["step"] for line in lines] == [0, 4], "at the first validation, and when they are due"
    assert all(line["samples"] == [{"prompt": "Once", "text": "Once there was"}] for line in lines)
    (line,) = read_metrics(folder / "metrics.jsonl", "config")
    assert (line["step"], line["config"]) == (0, "dim: 8")
    board = events(folder)
    first, sample = board.Tensors("samples/0/text_summary")
    assert first.step == 0
    (config,) = board.Tensors("config/text_summary")
    assert sample.step == 4
    assert b"Once there was" in sample.tensor_proto.string_val[0]
    assert b"dim: 8" in config.tensor_proto.string_val[0]


def test_a_coarse_log_still_has_the_first_and_the_last_step(tmp_path: Path) -> None:
    module = Monitored()
    watch = monitor(tmp_path / "elsewhere", log_every_steps=4, sample_every_steps=0)
    fit(module, tmp_path, [watch], steps=10, accumulate=1)
    lines = read_metrics(tmp_path / "elsewhere" / "metrics.jsonl", "train")
    assert [line["step"] for line in lines] == [1, 4, 8, 10]
    assert [line["train/loss"] for line in lines] == [module.losses[step - 1] for step in (1, 4, 8, 10)]


def test_watching_changes_nothing(tmp_path: Path) -> None:
    """The loss has noise of the global generator in it: not one number of it may be taken by the monitor."""
    watched, alone = Monitored(), Monitored()
    eager = MonitorConfig(1, router_statistics_every=1, sample_every_steps=1, sample_prompts=["Once"])
    fit(watched, tmp_path / "watched", [Monitor(eager)], steps=5)
    fit(alone, tmp_path / "alone", [], steps=5)
    assert watched.losses == alone.losses
    assert len(watched.samples_asked) == 6


class Save(Callback):
    """Saves at a step, and kills the run some steps later."""

    def __init__(self, path: Path, at: int, die: int) -> None:
        self.path, self.at, self.die = path, at, die

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.at and not self.path.exists():
            trainer.save_checkpoint(self.path)
        if trainer.global_step == self.die:
            raise KeyboardInterrupt


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    """Killed at step 7 with a torn last line, resumed from step 5: both records read as one run."""
    saved = tmp_path / "step-5.ckpt"
    first = Monitored()
    with pytest.raises(SystemExit):
        fit(first, tmp_path, [monitor(), Save(saved, at=5, die=7)], steps=9, accumulate=1)
    metrics = tmp_path / "metrics.jsonl"
    assert read_metrics(metrics, "train")[-1]["step"] == 7
    with metrics.open("a") as stream:
        stream.write('{"step": 8, "event": "train", "train/lo')
    second = Monitored()
    time.sleep(1.1)  # event files of one process and second are read by a number in their names, 10 before 9
    fit(second, tmp_path, [monitor()], steps=9, accumulate=1, ckpt_path=saved, first_batch=5)

    expected = first.losses[:5] + second.losses
    lines = read_metrics(metrics, "train")
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["train/loss"] for line in lines] == expected
    assert [line["step"] for line in read_metrics(metrics, "validation")] == [0, 3, 6, 9]
    assert [line["step"] for line in read_metrics(metrics, "config")] == [0, 5]
    assert metrics.read_text().endswith("}\n")
    curve = events(tmp_path).Scalars("train/loss")
    assert [scalar.step for scalar in curve] == list(range(1, 10))
    assert [scalar.value for scalar in curve] == pytest.approx(expected, rel=1e-6)


def test_other_ranks_take_part_but_write_nothing(tmp_path: Path) -> None:
    """They must generate samples too: under ZeRO-3 rank zero cannot do it alone."""
    module = Monitored()
    watch = monitor(sample_every_steps=1, router_statistics_every=1)
    trainer: Any = SimpleNamespace(
        is_global_zero=False, global_step=0, max_steps=5, default_root_dir=tmp_path, sanity_checking=False,
        train_dataloader=None,
    )  # fmt: skip
    watch.on_train_start(trainer, module)
    watch.on_train_batch_start(trainer, module, {}, 0)
    module.model(torch.zeros(8))
    trainer.global_step = 1
    module.step_metrics = {"loss": 1.0, "tokens": 8, "tokens_in_step": 8}
    with pytest.warns(UserWarning, match="no sample"):
        watch.on_train_batch_end(trainer, module, None, {}, 0)
    watch.on_validation_end(trainer, module)
    watch.teardown(trainer, module, "fit")
    assert [prompt for prompt, *_ in module.samples_asked] == ["Once", "too long"]
    assert module.model.layers[0].collected == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("interruption", ["sample", "validation", "checkpoint", "none"])
def test_only_training_counts_as_training_time(tmp_path: Path, interruption: str) -> None:
    """Two steps of ten seconds with a minute of something else in between, which looks like waiting for data
    only when it is nothing that the monitor knows of."""
    seconds = 0.0
    module = Monitored()
    watch = monitor(log_every_steps=2, sample_every_steps=1 if interruption == "sample" else 0)
    watch._clock = StepClock(lambda: seconds)
    trainer: Any = SimpleNamespace(
        is_global_zero=False, global_step=0, max_steps=9, sanity_checking=False, train_dataloader=None
    )

    def pause(*_: Any, **__: Any) -> str:
        nonlocal seconds
        seconds += 30.0  # for each of the two prompts
        return ""

    module.generate_sample = pause  # type: ignore[method-assign]
    module.step_metrics = {"loss": 1.0, "tokens": 80, "tokens_in_step": 80}
    watch.on_train_start(trainer, module)
    for _ in range(2):
        if trainer.global_step:
            if interruption == "validation":
                watch.on_validation_start(trainer, module)
                watch.on_validation_end(trainer, module)
            if interruption == "checkpoint":
                watch.on_save_checkpoint(trainer, module, {})
            if interruption != "sample":
                pause(), pause()
        watch.on_train_batch_start(trainer, module, {}, 0)
        seconds += 10.0
        trainer.global_step += 1
        if trainer.global_step == 2:
            watch.config.log_every_steps = 1000  # leave the reading to this test
            watch.config.sample_every_steps = 0
        watch.on_train_batch_end(trainer, module, None, {}, 0)
    speed = watch._clock.read()
    assert speed.tokens_per_second * speed.step_time == pytest.approx(80)
    assert speed.data_wait_share == pytest.approx(60 / 70 if interruption == "none" else 0.0)
    assert speed.checkpoint_time == (60.0 if interruption == "checkpoint" else 0.0)


def test_perplexity_never_overflows() -> None:
    assert perplexity(1.0) == math.e
    assert perplexity(1e6) == math.inf
    assert math.isnan(perplexity(math.nan))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"log_every_steps": 0}, "monitor.log_every_steps is 0"),
        ({"router_statistics_every": -1}, "monitor.router_statistics_every"),
        ({"sample_every_steps": -5}, "monitor.sample_every_steps"),
        ({"sample_tokens": 0}, "monitor.sample_tokens"),
        ({"peak_tflops": 0.0}, "monitor.peak_tflops"),
        ({"profile_at_step": 0}, "monitor.profile_at_step"),
        ({"alert_data_wait": 5.0}, "monitor.alert_data_wait"),
        (
            {"webhook": "example.org/hook"},
            "monitor.webhook is 'example.org/hook': give an address that begins",
        ),
        ({"webhook": "file:///etc/passwd"}, "monitor.webhook"),
        ({"webhook": "http://host:port/"}, "monitor.webhook"),
        ({"mlflow": "ftp://host"}, "http://… or https://… or file://…"),
    ],
)
def test_bad_values_name_their_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MonitorConfig(**values)


def test_heat_maps_are_images_of_the_steps_they_are_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: RoutedLayer, x: torch.Tensor) -> torch.Tensor:
        if getattr(self, "collect_map", False):
            self.statistics = {"router_entropy": torch.tensor(0.5), "block_map": torch.rand(4, 4)}
        return x * self.weight

    monkeypatch.setattr(RoutedLayer, "forward", forward)
    watch = monitor(tmp_path / "logs", router_images_every=2, router_statistics_every=0, sample_every_steps=0)
    fit(Monitored(), tmp_path, [watch], steps=4, accumulate=1)
    board = events(tmp_path)
    assert {tag: [image.step for image in board.Images(tag)] for tag in board.Tags()["images"]} == {
        "router/layer_00": [2, 4],
        "router/layer_01": [2, 4],
    }
    assert not read_metrics(tmp_path / "logs" / "metrics.jsonl", "router")


def test_heat_maps_need_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: RoutedLayer, x: torch.Tensor) -> torch.Tensor:
        if getattr(self, "collect_map", False):
            self.statistics = {"block_map": torch.rand(4, 4)}
        return x * self.weight

    monkeypatch.setattr(RoutedLayer, "forward", forward)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fit(Monitored(), tmp_path, [monitor(router_images_every=1, sample_every_steps=0)], steps=1)
    (image,) = events(tmp_path).Images("router/layer_00")
    assert (image.width, image.height) == (256, 256)


def test_an_alert_is_an_event_a_text_and_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The module's entropy is 0.5 everywhere: with a limit above it, both layers count as collapsed."""
    watch = monitor(tmp_path, alert_router_entropy=0.6, router_statistics_every=1, sample_every_steps=0)
    fit(Monitored(), tmp_path, [watch], steps=3)
    (line,) = read_metrics(tmp_path / "metrics.jsonl", "alert")
    assert (line["step"], line["kind"]) == (1, "router_collapse")
    assert "layer_00 (0.500), layer_01 (0.500)" in line["text"]
    (text,) = events(tmp_path).Tensors("alerts/router_collapse/text_summary")
    assert line["text"].encode() == text.tensor_proto.string_val[0]
    assert [record.message for record in caplog.records if "alert" in record.message] == [
        f"alert (router_collapse): {line['text']}"
    ]


def test_a_run_that_fails_says_so(tmp_path: Path) -> None:
    class Broken(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("the machine\nis on fire")

    watch = monitor(tmp_path, sample_every_steps=0)
    with pytest.raises(RuntimeError):
        fit(Monitored(), tmp_path, [watch, Broken()], steps=3, accumulate=1)
    (line,) = read_metrics(tmp_path / "metrics.jsonl", "alert")
    assert (line["step"], line["kind"]) == (2, "failed")
    assert line["text"] == "the training failed: the machine; is on fire"


def test_a_profile_of_two_steps(tmp_path: Path) -> None:
    watch = monitor(tmp_path, profile_at_step=2, profile_steps=2, sample_every_steps=0)
    fit(Monitored(), tmp_path, [watch], steps=4)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps-2-3.json.gz"
    names = [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    assert names.count("Optimizer.step#SGD.step") == 2
    (text,) = events(tmp_path).Tensors("profile/text_summary")
    assert text.step == 3
    assert b"aten::mul" in text.tensor_proto.string_val[0]
