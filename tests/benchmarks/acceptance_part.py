"""A part of the acceptance as its own process would run it: ``acceptance_part.py MODULE PART ARGUMENTS…``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

benchmarks = str(Path(__file__).parents[2] / "benchmarks")
sys.path[0] = benchmarks  # in the place of this folder
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
