"""How threads wait and how many there are: set before torch is loaded, never against the user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dualroute import threads

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_cores", lambda: 8)


def prepared(**given: str) -> dict[str, str]:
    """What is set beside what was given."""
    environ = dict(given)
    threads.prepare(environ)
    return {name: value for name, value in environ.items() if given.get(name) != value}


def test_waiting_threads_sleep_soon() -> None:
    assert prepared() == {"GOMP_SPINCOUNT": str(threads.SPINS)}
    assert 0 < threads.SPINS < 300_000  # what GNU's library does by itself


@pytest.mark.parametrize("name", threads.WAITING)
def test_whoever_says_how_threads_wait_is_obeyed(name: str) -> None:
    assert prepared(**{name: "ACTIVE"}) == {}
    assert "GOMP_SPINCOUNT" in prepared(**{name: ""})


@pytest.mark.parametrize(
    ("given", "number"),
    [
        ({}, None),
        ({"LOCAL_SIZE": "2"}, "4"),  # deepspeed
        ({"LOCAL_SIZE": "1"}, None),
        ({"LOCAL_WORLD_SIZE": "3"}, "2"),
        ({"LOCAL_WORLD_SIZE": "100"}, "1"),
        ({"LOCAL_WORLD_SIZE": "1", "SLURM_STEP_TASKS_PER_NODE": "4"}, None),
        ({"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "7"}, None),
        ({"LOCAL_SIZE": "two"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_CPUS_ON_NODE": "8"}, "2"),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_CPUS_ON_NODE": "32"}, None),  # bound to 8 of 32
    ],
)
def test_ranks_of_a_host_share_its_cores(given: dict[str, str], number: str | None) -> None:
    assert prepared(**given).get("OMP_NUM_THREADS") == number


@pytest.mark.parametrize(
    "entry",
    ["dualroute.__main__", "dualroute.cli", "launch/pretrain.py", "launch/distill.py", "launch/doctor.py"],
)
def test_every_entry_prepares_before_torch_is_loaded(entry: str) -> None:
    """Run up to the moment when it prepares; torch is not there yet."""
    script = f"""
import runpy, sys
from dualroute import threads
def prepare(*arguments):
    sys.exit(3 if "torch" in sys.modules else 0)
threads.prepare = prepare
sys.argv[1:] = ["pretrain"]
runpy.{"run_path" if entry.endswith(".py") else "run_module"}({entry!r}, run_name="__main__")
sys.exit(4)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert done.returncode == 0


def test_the_tests_prepare_too() -> None:
    assert any(os.environ.get(name) for name in threads.WAITING)
