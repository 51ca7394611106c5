"""What the benchmarks share: interleaved medians, peak memory of one call, a table and its CSV."""

from __future__ import annotations

import csv
import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dualroute.training.step.allocator import keep_freed_memory


def prepare(threads: int | None, device: str) -> torch.device:
    """Set threads and allocator for every side of a comparison, and say on what it runs."""
    target = torch.device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if target.type == "cpu":
        keep_freed_memory()
    name = torch.cuda.get_device_name(target) if target.type == "cuda" else _processor()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    return target


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def medians(
    works: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds of each work: one round to warm up, then `repeats` rounds in which they take turns.

    `clock` may be `time.process_time`, the seconds that this process computed: for one thread on a machine
    that others use, too.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            _finish(device)
            begin = clock()
            work()
            _finish(device)
            if repeat:
                times[name].append(clock() - begin)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mebibytes(
    function: Callable[..., Callable[[], Any]], *arguments: Any, device: torch.device
) -> float:
    """Memory that one call needs at its peak, beside what was there before it.

    `function(*arguments)` makes the inputs and returns the call to be measured. On a CPU it runs in a fresh
    process whose peak resident set is read afterwards (Linux; NaN elsewhere).
    """
    if device.type == "cuda":
        work = function(*arguments)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_resident, function, arguments).result()


def _peak_resident(function: Callable[..., Callable[[], Any]], arguments: Sequence[Any]) -> float:
    work = function(*arguments)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the making of the inputs left behind counts as free
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _status("VmRSS")
        work()
        return (_status("VmHWM") - before) / 2**10
    except (OSError, AttributeError):
        return float("nan")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def show(title: str, rows: Iterable[Mapping[str, str]], output: Path | None, name: str) -> None:
    """Print rows as a table and write them to `output`/`name`.csv.

    The columns are those of all rows together; a row that lacks one has an empty field there.
    """
    rows = list(rows)
    columns = _columns(rows)
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
    Console(width=max(80, 16 * len(columns))).print(table)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        with (output / f"{name}.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


def _columns(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Every column of some row; one that only a later row has comes behind that row's column before it."""
    columns: list[str] = []
    for row in rows:
        place = 0
        for column in row:
            if column in columns:
                place = columns.index(column) + 1
            else:
                columns.insert(place, column)
                place += 1
    return columns
