"""Every benchmark runs, at a toy size, and writes the table that it prints."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
import yaml

from tests import warm

ROUTES = "--routes 16/16/2 --heads 4 --head_dim 16 --repeats 1 --threads 1"

COMMANDS = {
    "speed": f"attention.py speed --lengths 64 256 {ROUTES} --no-memory --dtypes float32 bfloat16",
    "packed": f"attention.py packed --lengths 256 --document 64 {ROUTES}",
    "router": f"attention.py router --lengths 256 {ROUTES}",
    "decode": "decoding/decode.py --lengths 256 --heads 4 --head_dim 16 --block 16 --window 16 --repeats 1 "
    "--threads 1",
    "distillation_loss": "training/distillation_loss.py --tokens 64 --vocab 200 --dim 16 --teacher_dim 24 "
    "--repeats 1 --losses reverse_kl --threads 1",
    "train_step": "train_step.py --preset tiny --contexts 64 --tokens 128 --vocab_size 64 --repeats 1 "
    "--precisions 32 bf16-mixed --threads 1",
    "waiting_threads": "training/waiting_threads.py --threads 2 --batch 1 --context 32 --repeats 1 --busy 1 "
    "--settings passive 1000",
    "recall-mqar": "recall.py --variants dense local routed --seeds 0 --length 256 --start 128 --evaluate 2 "
    "--steps 4 --patience 4 --tokens 512 --batches 1 --min_distance 32 --window 8 --block 16 --threads 1 "
    "--ask_top_k 1 --ask_sub_block 8 --ask_cluster_span 32",
    "long_context": "long_context.py --tasks variables common --seeds 0 --length 128 --start 128 --steps 2 "
    "--patience 2 --tokens 256 --batches 1 --min_distance 16 --window 8 --block 16 --top_k 1 --threads 1",
    "recall-passkey": "recall.py --task passkey --variants routed --seeds 0 1 --length 128 --start 128 "
    "--steps 4 --patience 4 --tokens 256 --batches 1 --min_distance 32 --window 8 --block 16 --threads 1",
}
#: columns of recall's table that its routed row fills and the others leave empty
ASKED = [
    f"{name}, {length}" for length in (256, 512) for name in ("top_k 1", "sub_block 8", "cluster_span 32")
]

#: of these, the ones that take longest
NIGHTLY = {"distillation_loss", "waiting_threads"}

#: quality.py, whose trainings are not processes of their own
IN_ONE_PROCESS = """
import sys
from types import SimpleNamespace
sys.path.insert(0, {folder!r})
import quality
from dualroute.cli import main

def run(command, check):
    assert check and command[:3] == [sys.executable, "-m", "dualroute.cli"]
    assert main(command[3:]) == 0

quality.subprocess = SimpleNamespace(run=run)
quality.main()
"""

#: Loads each script without running it, alone on its path as Python starts it, and prints what fails
LOADED = """
import runpy, sys, traceback
from pathlib import Path
before, path = set(sys.modules), list(sys.path)
for script in sys.argv[1:]:
    folder = Path(script).parent
    sys.path[:] = [str(folder.parent if folder.name == "acceptance" else folder), *path]
    try:
        runpy.run_path(script, run_name="loaded")
    except BaseException:
        print(script, traceback.format_exc())
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith({folder!r}):
            del sys.modules[name]
"""


def run(root: Path, command: str, output: Path) -> list[dict[str, str]]:
    script, *options = command.split()
    words = [*options, "--output", str(output)]
    warm.ranks(1, str(root / "benchmarks" / script), words, cwd=root, env=os.environ)
    (table,) = output.glob("*.csv")
    with table.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.nightly if name in NIGHTLY else []) for name in COMMANDS],
)
def test_it_runs_and_writes_its_table(name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    rows = run(pytestconfig.rootpath, COMMANDS[name], tmp_path)
    assert (tmp_path / f"{name}.csv").is_file()
    assert rows
    for row in rows:
        asked = row.get("attention") == "routed"
        assert all(
            bool(value) == (asked or key not in ASKED) for key, value in row.items() if key != "peak MiB"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "ceiling"),
    [
        # dense: 2 x 128.5 keys; here: sink, two blocks and half of the own one, and a window of 16
        ("", 257 / (3.5 * 16 + 16 - 16 * 15 / 512)),
        # 2 x 256 keys; sink, two blocks and the own one, and the window to both sides
        ("--bidirectional --clock cpu", 512 / (4 * 16 + 31 - 16 * 15 / 256)),
    ],
)
def test_the_ceiling_is_the_ratio_of_what_is_read(
    more: str, ceiling: float, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    rows = run(pytestconfig.rootpath, f"{COMMANDS['speed']} {more}", tmp_path)
    long = next(row for row in rows if row["tokens"] == "256" and row["attention"] == "16/16/2")
    assert float(long["ceiling"]) == pytest.approx(ceiling, abs=0.06)


@pytest.mark.slow
def test_every_script_finds_what_it_imports(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    folder = pytestconfig.rootpath / "benchmarks"
    scripts = list(folder.rglob("*.py"))
    assert len(scripts) > 20
    (tmp_path / "loaded.py").write_text(LOADED.format(folder=str(folder)))
    printed = warm.ranks(
        1, str(tmp_path / "loaded.py"), list(map(str, scripts)), cwd=tmp_path, env=os.environ
    )
    assert not printed


@pytest.mark.slow
@pytest.mark.nightly
def test_quality_trains_and_compares(tiny_dataset: Path, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    variants = ["dense", "interleaved 5:1", "dual, routed"]
    options = (
        f"--data {tiny_dataset} --output {tmp_path} --tokens 256 --context 32 --lengths 2 --eval_tokens 256"
    )
    smaller = "--data.context 32 --train.tokens_per_batch 64 --optim.warmup_steps 1 --data.val_tokens 128"
    words = [*options.split(), "--variants", *variants, "--extra", *smaller.split()]
    script = tmp_path / "in_one_process.py"
    script.write_text(IN_ONE_PROCESS.format(folder=str(pytestconfig.rootpath / "benchmarks" / "models")))
    warm.ranks(1, str(script), words, cwd=pytestconfig.rootpath, env=os.environ)
    with (tmp_path / "quality.csv").open(newline="") as stream:
        rows = {row["attention"]: row for row in csv.DictReader(stream)}
    assert list(rows) == variants
    assert rows["dense"]["against dense"] == "+0.00 %"
    trained = {
        yaml.safe_load(path.read_text())["model"]["attention"] for path in tmp_path.glob("*/config.yaml")
    }
    assert trained == {"dense", "interleaved", "dual"}
    assert all(float(row["loss at 64"]) > 0 for row in rows.values())


@pytest.mark.slow
def test_checkpoint_times_both_ways(tiny_dataset: Path, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    options = f"--data {tiny_dataset} --preset tiny --context 64 --checkpoints 3 --repeats 1 --threads 1"
    rows = run(pytestconfig.rootpath, f"training/checkpoint.py {options}", tmp_path)
    assert [row["asynchronous"] for row in rows] == ["false", "true"]
    assert all(
        float(row[name]) > 0 for row in rows for name in ("stall ms", "longest ms", "steps between ms")
    )
