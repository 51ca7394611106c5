"""Where the time of a step goes, and what a device could do."""

from __future__ import annotations

import mmap

import pytest
import torch

from dualroute.training.monitoring.throughput import (
    StepClock,
    known_peak_tflops,
    measure_peak_tflops,
    memory_statistics,
    peak_tflops,
)


class Time:
    """A clock that moves when told."""

    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def passes(self, seconds: float) -> None:
        self.seconds += seconds


def batch(clock: StepClock, time: Time, *, wait: float, compute: float, tokens: int | None = None) -> None:
    time.passes(wait)
    clock.batch_started()
    time.passes(compute)
    if tokens is not None:
        clock.step_ended(tokens)
    else:
        clock.batch_ended()


def test_waiting_and_computing_are_told_apart() -> None:
    time = Time()
    clock = StepClock(time)
    for _ in range(2):  # two steps of two micro-batches
        batch(clock, time, wait=1.0, compute=3.0)
        batch(clock, time, wait=1.0, compute=3.0, tokens=400)
        clock.batch_ended()
    speed = clock.read()
    assert speed.tokens_per_second == pytest.approx(800 / 16)
    assert speed.step_time == pytest.approx(8.0)
    assert speed.data_wait_share == pytest.approx(0.25)


def test_of_a_gap_only_what_the_loader_took_is_a_wait() -> None:
    time = Time()
    clock = StepClock(time)
    for loaded in (0.25, 0.5, 0.75, 1.0):  # since it was made; of gaps of a second each
        time.passes(1.0)
        clock.batch_started(loaded)
        time.passes(1.5)
        clock.step_ended(10)
        clock.batch_ended()
    assert clock.read().data_wait_share == pytest.approx(1.0 / 10)


def test_each_reading_begins_anew() -> None:
    time = Time()
    clock = StepClock(time)
    batch(clock, time, wait=50.0, compute=50.0, tokens=1)
    clock.read()
    time.passes(0.5)  # writing the figures
    clock.batch_ended()
    batch(clock, time, wait=1.5, compute=2.0, tokens=100)
    speed = clock.read()
    assert speed.tokens_per_second == pytest.approx(25.0)
    assert speed.data_wait_share == pytest.approx(1.5 / 4)


def test_a_checkpoint_has_a_time_of_its_own() -> None:
    time = Time()
    clock = StepClock(time)
    batch(clock, time, wait=1.0, compute=3.0, tokens=80)
    clock.batch_ended()
    time.passes(5.0)  # a validation before it
    clock.checkpoint_started()
    time.passes(7.0)
    batch(clock, time, wait=0.0, compute=3.0, tokens=80)
    speed = clock.read()
    assert speed.checkpoint_time == 7.0
    assert speed.step_time == pytest.approx(7.0 / 2)
    batch(clock, time, wait=0.0, compute=3.0, tokens=80)
    assert clock.read().checkpoint_time == 0.0


def test_interruptions_are_neither_training_nor_waiting() -> None:
    """A validation or a checkpoint between two batches changes none of the figures."""
    readings = []
    for interruption in (0.0, 1000.0):
        time = Time()
        clock = StepClock(time)
        batch(clock, time, wait=1.0, compute=3.0, tokens=80)
        clock.batch_ended()
        clock.interrupt()
        time.passes(interruption)
        batch(clock, time, wait=0.0, compute=3.0, tokens=80)
        clock.batch_ended()
        batch(clock, time, wait=1.0, compute=2.0, tokens=80)
        readings.append(clock.read())
    assert readings[0] == pytest.approx(readings[1])
    assert readings[0].data_wait_share == pytest.approx(0.2)


def test_an_interruption_right_after_a_reading() -> None:
    time = Time()
    clock = StepClock(time)
    batch(clock, time, wait=1.0, compute=1.0, tokens=1)
    clock.read()
    clock.batch_ended()
    clock.interrupt()
    batch(clock, time, wait=500.0, compute=2.0, tokens=10)
    assert clock.read().tokens_per_second == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("Tesla T4", 65.0),
        ("AMD Instinct MI300X", None),
        ("NVIDIA A1000", None),
    ],
)
def test_peaks_are_found_by_the_names_that_drivers_give(name: str, peak: float | None) -> None:
    assert known_peak_tflops(name) == peak


def test_measuring_the_peak_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    assert 0 < measure_peak_tflops(torch.device("cpu")) < 1000
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_gpu_and_a_cpu_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualroute.training.monitoring.throughput.measure_peak_tflops", lambda device: 7.0)
    assert peak_tflops(torch.device("cpu")) == 7.0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some New GPU")
    assert peak_tflops(torch.device("cuda")) == 7.0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_tflops(torch.device("cuda")) == 989.4


def test_the_peak_of_memory_remembers_what_was_freed() -> None:
    before = memory_statistics(torch.device("cpu"))
    room = before["memory/peak_rss_gib"] - before["memory/rss_gib"]  # what may be taken without a new peak
    # taken from the system itself: an allocator may keep what is freed
    block = mmap.mmap(-1, int((room + 1 / 16) * 2**30))
    for begin in range(0, len(block), mmap.PAGESIZE):
        block[begin] = 1
    during = memory_statistics(torch.device("cpu"))
    block.close()
    after = memory_statistics(torch.device("cpu"))
    assert during["memory/peak_rss_gib"] > before["memory/peak_rss_gib"]
    assert after["memory/peak_rss_gib"] >= during["memory/peak_rss_gib"]
    assert 0 < after["memory/rss_gib"] < during["memory/rss_gib"]
