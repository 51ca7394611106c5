"""How fast, how much memory, how close to what the device could do.

:mod:`dualroute.training.monitoring.monitor` tells a :class:`StepClock` when batches and steps begin and
end; out come tokens per second, and with the model's FLOPs per token and :func:`peak_tflops` the model
FLOPs utilisation (MFU; PaLM, Chowdhery et al. 2022, appendix B).

Vendors print tensor-core peaks twice, and the larger figure is for 2:4 sparse matrices
that no training uses.  All peaks here are *dense* bfloat16.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

GIB = 2**30

# dense bfloat16 tensor-core TFLOP/s with float32 accumulation (float16 for V100 and T4, which lack bfloat16),
# from NVIDIA's data sheets; the first entry all of whose words are words of the device's name counts
_PEAK_TFLOPS = {
    "GB300": 2500.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 PCIE": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H800 PCIE": 756.0,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 ADA": 364.2,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
}


def known_peak_tflops(device_name: str) -> float | None:
    """Dense bfloat16 peak of a GPU by the name that the driver gives it; None where it is not known."""
    words = set(re.split(r"[\s\-_]+", device_name.upper()))
    return next((peak for name, peak in _PEAK_TFLOPS.items() if words.issuperset(name.split())), None)


def measure_peak_tflops(device: torch.device) -> float:
    """The best rate of many square matmuls: bfloat16 on a GPU, float32 on a CPU with its current threads.

    Takes a second, long enough for a moment in which nobody else uses the processor, and draws no random
    number.
    """
    on_cpu = device.type == "cpu"
    size = 768 if on_cpu else 8192
    matrix = torch.full((size, size), 0.5, device=device, dtype=torch.float32 if on_cpu else torch.bfloat16)
    best = float("inf")
    end = time.perf_counter() + 1.0
    while time.perf_counter() < end:
        begin = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e12


def peak_tflops(device: torch.device) -> float:
    """Peak of one device in TFLOP/s: from the table for a known GPU, measured otherwise."""
    known = known_peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known if known is not None else measure_peak_tflops(device)


def memory_statistics(device: torch.device) -> dict[str, float]:
    """This process's memory in GiB: resident set, and on CUDA what the allocator held at most."""
    process = psutil.Process()
    statistics = {
        "memory/rss_gib": process.memory_info().rss / GIB,
        "memory/peak_rss_gib": _peak_rss_bytes(process) / GIB,
    }
    if device.type == "cuda":
        statistics["memory/peak_allocated_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        statistics["memory/peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
    return statistics


def _peak_rss_bytes(process: psutil.Process) -> int:
    if sys.platform == "win32":
        return process.memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


@dataclass(frozen=True)
class Speed:
    """What happened since the last reading; validation, checkpoints and sampling are not in it.

    Attributes:
        tokens_per_second: Tokens of all devices.
        step_time: Seconds per optimizer step.
        data_wait_share: Share of that time spent waiting for the loader, in [0, 1].
        checkpoint_time: Seconds for which training stood still for checkpoints, all of them together.
        steps: Optimizer steps.
    """

    tokens_per_second: float
    step_time: float
    data_wait_share: float
    checkpoint_time: float = 0.0
    steps: int = 1


class StepClock:
    """Divides wall time into computing, waiting for data, and interruptions.

    Between the end of one batch and the begin of the next stand the loader and some milliseconds of the
    Trainer's own - unless :meth:`interrupt` was called in between; then that gap belongs to neither.

    Args:
        now: Seconds from any origin.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.start()

    def start(self) -> None:
        """Forget everything; the wait for the first batch begins."""
        self._gap_begin = self._now()
        self._interrupted = False
        self._saving: float | None = None
        self._loader_waited = 0.0
        self._reset()

    def _reset(self) -> None:
        self._begin = self._now()
        self._waited = self._excluded = self._saved = 0.0
        self._steps = self._tokens = 0

    def batch_started(self, loader_waited: float | None = None) -> None:
        """The loader has delivered.

        Args:
            loader_waited: Seconds that were spent in it since it was made; None where it does not count
                them, and the whole gap was a wait.
        """
        now = self._now()
        gap = now - self._gap_begin
        if self._saving is not None:
            self._saved += now - self._saving
            self._saving = None
        if self._interrupted:
            self._excluded += gap
        else:
            self._waited += gap if loader_waited is None else min(gap, loader_waited - self._loader_waited)
        self._loader_waited = loader_waited or 0.0
        self._interrupted = False

    def batch_ended(self) -> None:
        """From here on the next batch is awaited."""
        self._gap_begin = self._now()

    def interrupt(self) -> None:
        """Something that is not training happens before the next batch."""
        self._interrupted = True

    def checkpoint_started(self) -> None:
        """Until the next batch a checkpoint is written; an interruption."""
        self._saving = self._now()
        self.interrupt()

    def step_ended(self, tokens: float) -> None:
        """An optimizer step over ``tokens`` tokens (of all devices) is done."""
        self._steps += 1
        self._tokens += int(tokens)

    def read(self) -> Speed:
        """Mean speed since the last reading; call it between :meth:`step_ended` and :meth:`batch_ended`."""
        elapsed = max(self._now() - self._begin - self._excluded, 1e-9)
        speed = Speed(
            self._tokens / elapsed,
            elapsed / max(self._steps, 1),
            self._waited / elapsed,
            self._saved,
            self._steps,
        )
        self._reset()
        return speed
