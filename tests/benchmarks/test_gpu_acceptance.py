"""The acceptance table: a part that fails, hangs or dies is a row, and the others go on; and its toy size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.conftest import ROOT

PART = ROOT / "tests" / "benchmarks" / "acceptance_part.py"


@pytest.fixture
def acceptance(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_acceptance

    yield gpu_acceptance
    for name in [name for name in sys.modules if name == "gpu_acceptance" or name.startswith("acceptance")]:
        del sys.modules[name]


ROW = {"part": "speed", "what": "a", "found": "1 | 2\n3", "wanted": "", "passed": True}
LEAVES = f"import sys; open(sys.argv[1], 'w').write({json.dumps(json.dumps(ROW))} + chr(10)); "


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("", None),
        ("sys.exit('it is broken')", "exit status 1 after 0 s: it is broken"),
        ("import os; print('before', flush=True); os.kill(os.getpid(), 11)", "signal 11 after 0 s: before"),
        ("import time; time.sleep(60)", "not finished after 1 s"),
    ],
    ids=["fine", "fails", "dies", "hangs"],
)
def test_a_part_keeps_its_rows_however_it_ends(
    acceptance: Any, then: str, said: str | None, tmp_path: Path
) -> None:
    rows = tmp_path / "rows"
    command = [sys.executable, "-c", LEAVES + then, str(rows)]
    first, *others = acceptance.run_part("speed", command, rows, tmp_path / "log", 1.0)
    assert first.found == ROW["found"]
    assert first.passed
    assert [(row.found, row.passed) for row in others] == ([] if said is None else [(said, False)])


def test_a_part_that_finds_nothing_fails(acceptance: Any, tmp_path: Path) -> None:
    (row,) = acceptance.run_part("speed", [sys.executable, "-c", ""], tmp_path / "rows", tmp_path / "log", 10)
    assert (row.found, row.passed) == ("it ended well and found nothing", False)


def test_one_failure_stops_no_other_part_and_is_the_exit_status(
    acceptance: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    verdicts = {"speed": False, "decode": None}

    def run_part(part: str, command: list[str], rows: Path, log: Path, seconds: float) -> list[Any]:
        asked.append((part, seconds))
        return [acceptance.Row(**{**ROW, "part": part, "passed": verdicts.get(part, True)})]

    monkeypatch.setattr(acceptance, "run_part", run_part)
    monkeypatch.setattr(sys, "argv", ["x", "--toy", "--minutes", "10", "--output", str(tmp_path / "out")])
    assert acceptance.main() == 1
    verdicts["speed"] = True
    assert acceptance.main() == 0
    first = asked[: len(acceptance.PARTS)]
    assert [part for part, _ in first] == list(acceptance.PARTS)
    assert sum(seconds for _, seconds in first) == pytest.approx(600)
    text = (tmp_path / "out" / "acceptance.md").read_text()
    assert "| speed | a | pass | 1 \\| 2 3 |" in text
    assert "| speed | a | **FAIL** | 1 \\| 2 3 |" in capsys.readouterr().out
    assert "| decode | a | skipped |" in text
    assert "torch" in text.splitlines()[2]
    monkeypatch.setattr(sys, "argv", ["x", "--toy", "--only", "quantized", "--output", str(tmp_path / "out")])
    asked.clear()
    acceptance.main()
    assert [part for part, _ in asked] == ["training", "quantized"]  # which makes the model


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_the_toy_form_fills_the_table(
    acceptance: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its parts as copies of a process that has imported everything; how they start is asked below."""

    def run_part(part: str, command: list[str], rows: Path, log: Path, seconds: float) -> list[Any]:
        done = warm.run(command[2:], script=PART, cwd=ROOT, env=_environment(), timeout=600)
        assert done.returncode == 0, f"{part}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return acceptance.read(rows)

    monkeypatch.setattr(acceptance, "run_part", run_part)
    monkeypatch.setattr(sys, "argv", ["x", "--toy", "--output", str(tmp_path)])
    assert acceptance.main() == 0
    rows = _rows(tmp_path)
    assert {row[0].strip("| ") for row in rows} == set(acceptance.PARTS)
    assert all(row[2] in ("pass", "skipped") for row in rows)
    passed = {row[1] for row in rows if row[2] == "pass"}
    assert passed >= {
        "tests of the kernels",
        "cpp at toy",
        "20 steps",
        "2 rank(s), 4 steps",
        "int4_weight_only",
    }


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_script_starts_it_with_the_python_that_is_named(tmp_path: Path) -> None:
    command = ["bash", "benchmarks/gpu_acceptance.sh", "--toy", "--only", "decode", "--output", str(tmp_path)]
    command += ["--minutes", "40"]  # the limits of its parts are not what is asked about on a busy machine
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    ((part, what, *_),) = _rows(tmp_path)
    assert (part, what) == ("| decode", "a step at 512 tokens")


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # of other tests
    return {**kept, "DUALROUTE_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def _rows(folder: Path) -> list[list[str]]:
    text = (folder / "acceptance.md").read_text()
    return [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
