"""Lists of the long-range benchmark have the value that their text says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.data import listops


def evaluated(text: str) -> int:
    """The value of a text, read symbol by symbol with a stack."""
    stack: list[list[int | str]] = [[]]
    for symbol in text:
        if symbol in listops.OPERATORS:
            stack.append([symbol])
        elif symbol == "]":
            operator, *digits = stack.pop()
            values = sorted(int(digit) for digit in digits)
            half = (len(values) - 1) // 2
            value = {
                "M": max(values),
                "m": min(values),
                "s": sum(values) % 10,
                "e": (values[half] + values[len(values) // 2]) // 2,
            }[str(operator)]
            stack[-1].append(value)
        else:
            stack[-1].append(int(symbol))
    return int(stack[0][0])


@pytest.mark.parametrize(
    ("text", "value"), [("M29e478]0]", 9), ("e4731]", 3), ("s99m45]]", 2), ("m8e96]M1]]", 1)]
)
def test_values_by_hand(text: str, value: int) -> None:
    assert evaluated(text) == value


def test_rows_say_their_value_and_no_text_is_in_two_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = "--train 60 --validation 20 --test 20 --min_length 20 --max_length 80".split()
    output = tmp_path / "lists"
    monkeypatch.setattr(sys, "argv", ["listops.py", "--output", str(output), *sizes])
    listops.main()
    parts = {
        name: [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation", "test")
    }
    assert [len(part) for part in parts.values()] == [60, 20, 20]
    rows = [row for part in parts.values() for row in part]
    assert len({row["text"] for row in rows}) == 100
    for row in rows:
        assert 20 <= len(row["text"]) <= 80
        assert str(evaluated(row["text"])) == row["label"]
