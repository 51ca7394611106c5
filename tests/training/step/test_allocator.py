"""Freed memory stays with the process: checked in a process of its own, whose allocator is then changed."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from pathlib import Path
import numpy
from dualroute.training.step.allocator import give_back_freed_memory, keep_freed_memory

def resident():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS"))
    return int(line.split()[1]) / 1024

if sys.argv[1] != "default":
    assert keep_freed_memory()
before = resident()
large = numpy.ones(64 << 20, dtype=numpy.uint8)
del large
if sys.argv[1] == "give back":
    assert give_back_freed_memory()
    large = numpy.ones(8 << 20, dtype=numpy.uint8)
    del large
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_kept_only_when_asked() -> None:
    def left(how: str) -> float:
        command = [sys.executable, "-c", PROGRAM, how]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert left("default") < 16 < 48 < left("keep")
    assert left("give back") < 4
