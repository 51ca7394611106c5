"""Utterances are joined from single takes, and no take is in both parts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")

from benchmarks.data import spoken_digits  # noqa: E402  # needs soundfile


def test_strings_say_what_is_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each take is a constant of its own, so that an utterance tells which takes it was joined from."""
    source, output = tmp_path / "recordings", tmp_path / "digits"
    source.mkdir()
    for digit in range(10):
        for take in range(7):
            value = (digit * 7 + take + 1) / 100
            soundfile.write(source / f"{digit}_ann_{take}.wav", np.full(200, value), 8000, subtype="FLOAT")
    options = [
        "--source",
        str(source),
        "--output",
        str(output),
        "--train_strings",
        "5",
        "--test_strings",
        "5",
    ]
    monkeypatch.setattr(sys, "argv", ["spoken_digits.py", *options])
    spoken_digits.main()
    assert len(list((output / "train").glob("*/*.wav"))) == 20
    assert len(list((output / "test").glob("*/*.wav"))) == 50
    for part in ("train", "test"):
        for line in (output / f"strings_{part}.jsonl").read_text().splitlines():
            row = json.loads(line)
            samples, rate = soundfile.read(output / row["audio"])
            assert rate == 8000
            loud = np.round(samples[samples > 0.005] * 100).astype(int)
            takes = [int(group[0]) - 1 for group in np.split(loud, np.flatnonzero(np.diff(loud)) + 1)]
            words = row["text"].split()
            assert 3 <= len(words) <= 8
            if len(takes) == len(words):  # a take twice in a row is one run of its constant
                assert [spoken_digits.WORDS[take // 7] for take in takes] == words
            assert {take % 7 < spoken_digits.TEST_TAKES for take in takes} == {part == "test"}
