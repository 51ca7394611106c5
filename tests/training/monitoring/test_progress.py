"""The line that says how far a run is, in a terminal and in a file."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from dualroute.training.monitoring.progress import Progress, format_count, format_time
from tests.training.monitoring.monitored_module import TOKENS_PER_STEP, Monitored, fit

pytestmark = pytest.mark.filterwarnings("ignore:.*(num_workers|sanity).*")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Ticks:
    """A clock on which each look takes two seconds."""

    seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 2.0
        return self.seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0.0, "0"),
        (999, "999"),
        (1000, "1k"),
        (12345, "12.3k"),
        (1.5e6, "1.5M"),
        (7.25e9, "7.25B"),
        (3e12, "3T"),
    ],
)
def test_counts_are_short(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.7, "0:01:00"), (3723, "1:02:03"), (90061, "1d 1:01:01"), (float("inf"), "?")],
)
def test_times_are_clocks(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


def test_a_file_gets_a_plain_line_now_and_then(tmp_path: Path) -> None:
    """Two seconds a step, a line every five seconds at least: steps 1, 4, 7, 10 and the last."""
    stream = io.StringIO()
    fit(Monitored(), tmp_path, [Progress(5.0, stream, Ticks())], steps=11, accumulate=1, val_every=5)
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    steps = [line.split()[1] for line in lines if "tokens/s" in line]
    assert steps == ["1/11", "4/11", "7/11", "10/11", "11/11"]
    seventh = next(line for line in lines if "step 7/11" in line)
    for part in ("  loss ", "  lr 1.00e-01", f"  {TOKENS_PER_STEP / 2:.3g} tokens/s", "  3 skipped"):
        assert part in seventh
    assert seventh.endswith("  0:00:08 left")
    validations = [line for line in lines if "validation" in line]
    assert validations == [
        "step 5  validation loss 6.0000  perplexity 403.4",
        "step 10  validation loss 11.0000  perplexity 5.987e+04",
    ]


def test_a_terminal_gets_one_moving_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    stream = Terminal()
    fit(Monitored(), tmp_path, [Progress(5.0, stream, Ticks())], steps=4, accumulate=2)
    text = stream.getvalue()
    assert "step 4/4" in text
    assert "0:00:00 left" in text
    assert 0 <= text.rfind("\x1b[?25l") < text.rfind("\x1b[?25h"), "the hidden cursor comes back"
    assert "validation loss 4.0000" in text


def test_it_works_with_a_module_that_reports_nothing(tmp_path: Path) -> None:
    class Silent(Monitored):
        def optimizer_step(self, *args: object, **kwargs: object) -> None:
            super().optimizer_step(*args, **kwargs)
            self.step_metrics = {}

    stream = io.StringIO()
    fit(Silent(), tmp_path, [Progress(0.0, stream)], steps=2, accumulate=1)
    assert stream.getvalue().startswith("step 1/2  0 tokens/s")
