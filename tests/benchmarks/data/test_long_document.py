"""The benchmark of long documents: both ways give the same ids."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_parts_and_the_whole_agree(tiny_dataset: Path, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    (tmp_path / "text.txt").write_text("the old river sees a red bird\n" * 20)
    script = pytestconfig.rootpath / "benchmarks" / "data" / "long_document.py"
    line = [sys.executable, str(script), str(tmp_path / "text.txt"), str(tiny_dataset / "tokenizer.model")]
    result = subprocess.run([*line, "--megabytes", "0.02"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    parts, whole = result.stdout.splitlines()
    assert parts.startswith("parts: ")
    assert whole.startswith("whole: ")
    ids = [re.search(r"([\d,]+) tokens.*checksum (\d+)", line).groups() for line in (parts, whole)]
    assert ids[0] == ids[1]
