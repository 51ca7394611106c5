"""The estimate of the kernels on a GPU: a shape of every kind, and numbers that follow the machine code."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.nightly
def test_it_prints_every_kernel_of_a_shape(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = str(pytestconfig.rootpath / "benchmarks" / "gpu_estimate.py")
    words = ["--shapes", "8k, 128/64/4", "32k, 128/64/4", "--rows", "8k, 128", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, script, *words],
        cwd=pytestconfig.rootpath, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("select forward", "tokens forward", "far backward", "sort of pairs backward"):
        assert name in done.stdout
    with (tmp_path / "gpu_estimate.csv").open(newline="") as stream:
        short, long, *_ = csv.DictReader(stream)
    # the fast end of either range: launches, as many for one length as for the other, take the least there
    slow, fast = (float(row["with backward ms"].split("-")[0]) for row in (long, short))
    # four times the tokens: about four times the time, less where launches count; dense takes sixteen
    assert 2 < slow / fast < 8
    gains = [float(row["x with backward"].split("-")[0]) for row in (short, long)]
    assert gains[1] > gains[0] > 0
