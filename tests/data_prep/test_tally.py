"""A tally stays small and printable, whatever the corpus."""

from __future__ import annotations

import json
import os

import pytest

from data_prep.tally import MAX_EXAMPLES, MAX_REASONS, OTHER, Tally, describe, readable, reasons_of


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (os.fsdecode(b"caf\xe9.txt"), "caf\\xe9.txt"),
        ("two\nlines\x1b[31m", "two\\x0alines\\x1b[31m"),
        ("\ud800\u2028", "\\ud800\\u2028"),
        ("naïve/中文.txt", "naïve/中文.txt"),
    ],
)
def test_names_are_shown_in_one_printable_line(name, shown):
    assert readable(name) == shown
    readable(name).encode()


def test_reasons_and_names_are_bounded_and_nothing_goes_uncounted():
    tally = Tally()
    for number in range(10 * MAX_REASONS):
        tally.skip(f"reason {number}", f"{'x' * 1000}/{number}")
        tally.skip("often", number)
    assert len(tally.skipped) <= MAX_REASONS + 1
    assert sum(entry.count for entry in tally.skipped.values()) == 20 * MAX_REASONS
    assert OTHER in tally.skipped
    assert tally.skipped["often"].examples == [str(number) for number in range(MAX_EXAMPLES)]
    assert len(json.dumps(tally.to_json())) < 400 * MAX_REASONS * 2
    assert len(describe(tally.to_json())) < 20


def test_tallies_add_up():
    first, second = Tally(), Tally()
    for tally, name in ((first, "a"), (second, "b")):
        tally.read[".txt"] += 2
        tally.skip("hidden", name)
    second.skip("unknown kind .png", "c.png")
    first.add(second)
    assert first.to_json() == {
        "read": {".txt": 4},
        "skipped": {
            "hidden": {"count": 2, "examples": ["a", "b"]},
            "unknown kind .png": {"count": 1, "examples": ["c.png"]},
        },
    }
    assert describe(first.to_json()) == [
        "read: 4 .txt",
        "not read: 3 files, folders or members of archives",
        "  1 of unknown kinds: 1 .png (text_endings makes them text)",
        "  2 hidden: a, b",
    ]
    assert reasons_of(first.to_json())[0] == "2 hidden (like a)"
