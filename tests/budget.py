"""How long the tests took: the slowest ones and the whole, beside what the suite may take.

A pytest plugin (see conftest.py).  CPU seconds are those of a test and of the processes that it started and
waited for: they say where the time goes on a busy machine, too.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Generator

import pytest

from tests import warm

#: Minutes that the whole suite may take on two quiet cores, and the part without the marker "slow".
BUDGET, QUICK_BUDGET = 15, 3
_PROPERTY = "cpu_seconds"


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system + warm.cpu_seconds()


class Budget:
    """Collects the seconds of each test from its reports, the workers' too."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # wall, CPU

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None]:
        now = _cpu_seconds()
        before = getattr(item, "_cpu_before", None)
        item._cpu_before = now  # type: ignore[attr-defined]
        if before is not None:
            item.user_properties.append((f"{_PROPERTY}_{call.when}", now - before))
        yield

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        item._cpu_before = _cpu_seconds()  # type: ignore[attr-defined]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        wall_and_cpu = self.seconds[report.nodeid]
        wall_and_cpu[0] += report.duration
        wall_and_cpu[1] += sum(
            float(value) for name, value in report.user_properties if name == f"{_PROPERTY}_{report.when}"
        )

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, config: pytest.Config
    ) -> None:
        if hasattr(config, "workerinput") or len(self.seconds) < 50:
            return
        wall, cpu = time.monotonic() - self.began, sum(cpu for _, cpu in self.seconds.values())
        quick = "not slow" in (config.option.markexpr or "")
        terminalreporter.section("time")
        for name, (seconds, of_cpu) in sorted(self.seconds.items(), key=lambda item: -item[1][0])[:15]:
            terminalreporter.write_line(f"{seconds:7.1f} s  {of_cpu:7.1f} s of CPU  {name}")
        terminalreporter.write_line(
            f"{wall / 60:.1f} minutes, {cpu / 60:.1f} of CPU; the budget is "
            f"{QUICK_BUDGET if quick else BUDGET} minutes on two quiet cores"
        )
        folder = os.environ.get("DUALROUTE_TEST_TIMES")
        if folder:
            with open(folder, "w", encoding="utf-8") as stream:
                for name, (seconds, of_cpu) in self.seconds.items():
                    stream.write(f"{seconds:.2f}\t{of_cpu:.2f}\t{name}\n")


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin."""
    config.pluginmanager.register(Budget(), "dualroute-budget")
