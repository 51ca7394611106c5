"""A bar on a terminal, lines elsewhere, silence on request."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from data_prep import progress
from data_prep.progress import Reporter


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)


def shown(terminal: bool, enabled: bool = True) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=160, _environ={})
    reporter = Reporter(enabled, console)
    with reporter.phase("writing shards", 4_000_000) as phase:
        for step in range(1, 5):
            phase.update(step * 1_000_000, documents=step, tokens=step * 250_000)
    download = reporter.download("downloading a.zip")
    download(500_000, None)
    download(1_000_000, 1_000_000)
    reporter.note("ready [train]")
    return stream.getvalue()


def test_lines_where_there_is_no_terminal(at_once):
    lines = shown(terminal=False).splitlines()
    assert lines[1].startswith("writing shards: 2 documents, 2.0 MB, 0.50 M tokens, 50 %, ")
    assert lines[1].endswith(" s left")
    assert "downloading a.zip: 0.5 MB" in lines
    assert lines[-1] == "ready [train]"  # no markup is read into it


def test_lines_come_seldom():
    assert shown(terminal=False).splitlines() == ["ready [train]"]


def test_a_bar_on_a_terminal(at_once):
    text = shown(terminal=True)
    assert "4 documents, 4.0 MB, 1.00 M tokens" in text
    assert "\x1b[" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_silence(at_once, terminal):
    assert shown(terminal, enabled=False) == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_a_name_does_nothing_to_the_terminal(terminal):
    stream = io.StringIO()
    Reporter(True, Console(file=stream, force_terminal=terminal, width=160, _environ={})).note(
        "a\x1b[31m\x07\r.tar: made again\nté\udcff水"
    )
    assert stream.getvalue() == "a\\x1b[31m\\x07\\r.tar: made again\nté\\udcff水\n"
