"""Ranks that really meet, on gloo, against a loop in plain torch; all stages in one pair of processes.

Launchers start theirs in test_distributed.py.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dualroute.errors import UserError
from dualroute.training.parallel.environment import World
from dualroute.training.parallel.strategy import OneProcessStrategy, ParallelConfig, build_strategy
from tests import warm
from tests.training.parallel.processes import strategy_runs
from tests.training.step.test_module import environment

ROOT = Path(__file__).resolve().parents[3]
pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")]

WAYS: dict[str, dict[str, Any]] = {
    "zero0": {"strategy": "deepspeed", "zero_stage": 0},
    "zero1": {"strategy": "deepspeed", "zero_stage": 1},
    "zero2": {"strategy": "deepspeed", "zero_stage": 2},
    "zero3": {"strategy": "deepspeed", "zero_stage": 3},
    "ddp": {"strategy": "ddp"},
}
SPOILT: dict[str, Any] = {
    "steps": 16,
    "accumulation": 2,
    "clip": 0.5,
    "poison": {"loss": [3, 11], "gradient": [6]},
    "skip": [0, 9],
}
# What is trained; plain SGD shows a gradient of the wrong size, which Adam hides.
RUNS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "accumulated": {"steps": 14, "accumulation": 2, "clip": 0.5, "optimizer": "sgd"},
    "spoilt": SPOILT,
}
OFFLOADED = ["zero2", "zero3"]


def launch(ranks: int, folder: Path, cases: list[dict[str, Any]]) -> Any:
    """The results of ``strategy_runs.py`` in so many ranks."""
    (folder / "cases.json").write_text(json.dumps(cases))
    extensions = folder / "extensions"
    words = [str(folder / "cases.json"), str(folder / "results.json")]
    place = {**environment(), "TORCH_EXTENSIONS_DIR": str(extensions)}
    warm.ranks(ranks, strategy_runs.__file__, words, cwd=folder, env=place)
    assert not extensions.exists() or not any(extensions.iterdir()), "an op was compiled"
    return json.loads((folder / "results.json").read_text())


def plain_torch(
    steps: int = 20,
    accumulation: int = 1,
    clip: float | None = None,
    poison: dict[str, list[int]] | None = None,
    skip: list[int] | None = None,
    optimizer: str = "adamw",
) -> dict[str, list[Any]]:
    """The truth: no trainer, one process, whole batches; a bad step is one that is simply not taken."""
    module = strategy_runs.Module({}, [], optimizer, 0)
    made = module.configure_optimizers()
    stepper, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    result: dict[str, list[Any]] = {"losses": [], "norms": [], "skipped": [], "rates": []}
    data = iter(strategy_runs.Slices(World(), 1))
    for step in range(steps):
        x, y = next(data)
        loss = torch.nn.functional.cross_entropy(module.net(x), y)
        stepper.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip or math.inf)
        bad_loss, bad_gradient = (step in (poison or {}).get(name, []) for name in ("loss", "gradient"))
        bad = bad_loss or bad_gradient or step in (skip or [])
        result["losses"].append(math.nan if bad_loss else loss.item())
        result["norms"].append(math.inf if bad_loss or bad_gradient else norm.item())
        result["skipped"].append(bad)
        result["rates"].append(schedule.get_last_lr()[0])
        if not bad:
            stepper.step()
        schedule.step()
    return result


def assert_same(got: dict[str, Any], truth: dict[str, list[Any]], tolerance: float = 1e-5) -> None:
    assert got["skipped"] == truth["skipped"]
    assert got["rates"] == truth["rates"]
    assert got["losses"] == pytest.approx(truth["losses"], abs=tolerance, nan_ok=True)
    assert got["norms"] == pytest.approx(truth["norms"], abs=tolerance)
    first = next(norm for norm in truth["norms"] if math.isfinite(norm))  # before rounding adds up
    assert got["norms"][truth["norms"].index(first)] == pytest.approx(first, abs=max(1e-6, tolerance / 10))
    assert got["global_step"] == len(truth["losses"])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    named = {(way, name): WAYS[way] | run for way in WAYS for name, run in RUNS.items()}
    named |= {(way, "offloaded"): WAYS[way] | SPOILT | {"offload": True} for way in OFFLOADED}
    named |= {(way, "bf16"): WAYS[way] | SPOILT | {"precision": "bf16-mixed"} for way in WAYS}
    results = launch(2, tmp_path_factory.mktemp("ranks"), list(named.values()))
    return dict(zip(named, results, strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_one_process_is_plain_torch(name: str) -> None:
    assert_same(strategy_runs.run(strategy="single", **RUNS[name]), plain_torch(**RUNS[name]))


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_are_plain_torch(two_ranks: dict[tuple[str, str], Any], way: str, name: str) -> None:
    """Losses, gradient norms, learning rates; with ``spoilt`` also the skipped steps and what follows."""
    got = two_ranks[way, name]
    assert got["world_size"] == 2
    assert_same(got, plain_torch(**RUNS[name]))
    if way.startswith("zero"):
        assert got["engine_steps"] == got["global_step"], "a skipped step counts in DeepSpeed too"


@pytest.mark.parametrize("way", OFFLOADED)
def test_offloaded_optimizer_skips_alike(two_ranks: dict[tuple[str, str], Any], way: str) -> None:
    assert_same(two_ranks[way, "offloaded"], plain_torch(**SPOILT))


@pytest.mark.parametrize("way", WAYS)
def test_bf16_stays_near_and_skips_alike(two_ranks: dict[tuple[str, str], Any], way: str) -> None:
    assert_same(two_ranks[way, "bf16"], plain_torch(**SPOILT), tolerance=0.022)


def test_resume_continues_as_if_never_stopped(tmp_path: Path) -> None:
    """Two ranks, saved by Lightning in the middle, after a skipped step."""
    run = {"accumulation": 2, "clip": 0.5, "skip": [2]}
    half, cases = 6, []
    for name, way in WAYS.items():
        saved = str(tmp_path / name)
        cases.append(way | run | {"steps": half, "save": saved})
        cases.append(way | run | {"steps": 2 * half, "load": saved, "first_step": half})
    results = launch(2, tmp_path, cases)
    truth = plain_torch(steps=2 * half, **run)
    for name, first, second in zip(WAYS, results[::2], results[1::2], strict=True):
        assert second["global_step"] == 2 * half, name
        for key, tolerance in (("losses", 1e-6), ("norms", 1e-5), ("skipped", 0), ("rates", 0)):
            assert first[key] + second[key] == pytest.approx(truth[key], abs=tolerance), (name, key)


def test_deepspeed_without_a_launcher(tmp_path: Path) -> None:
    """One process may want DeepSpeed too, for offloading; it finds its own port and compiles nothing."""
    case = WAYS["zero3"] | {"steps": 5, "offload": True}
    results = launch(1, tmp_path, [case])
    assert_same(results[0], plain_torch(steps=5))


def test_port_in_use_is_said_at_once(tmp_path: Path) -> None:
    """By rank 0, as the deepspeed launcher starts it, before it waits for anybody."""
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "CROSS_RANK": "0", "LOCAL_SIZE": "2"}
    with contextlib.closing(socket.socket()) as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        place = {**environment(), **ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        (tmp_path / "cases.json").write_text(json.dumps([{"strategy": "ddp", "steps": 1}]))
        words = [str(tmp_path / "cases.json"), str(tmp_path / "results.json")]
        result = warm.run(words, cwd=tmp_path, env=place, script=strategy_runs.__file__)
    assert result.returncode == 1
    assert f"UserError: port {port} (MASTER_PORT)" in result.stderr
    assert "--master_port N" in result.stderr


def test_missing_deepspeed_names_the_extra(tmp_path: Path) -> None:
    """Importing needs no DeepSpeed, DDP neither; only asking for it does."""
    program = """
import sys
sys.modules["deepspeed"] = None
from dualroute.training.parallel.environment import World
from dualroute.training.parallel.strategy import ParallelConfig, build_strategy
world = World(world_size=2, main_port=1)
build_strategy(ParallelConfig("ddp"), world, micro_batch=1)
try:
    build_strategy(ParallelConfig(), world, micro_batch=1)
except ValueError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.stdout.strip() == "UserError this needs DeepSpeed: pip install -e '.[deepspeed]'"


def test_auto_is_one_plain_process_or_deepspeed() -> None:
    assert isinstance(
        build_strategy(ParallelConfig(zero_stage=3), World(), micro_batch=1), OneProcessStrategy
    )


@pytest.mark.parametrize(
    ("config", "world", "message"),
    [
        (ParallelConfig("single"), World(world_size=2, launcher="torchrun"), "torchrun started 2 processes"),
        (
            ParallelConfig("ddp", zero_stage=2),
            World(world_size=2),
            "zero_stage=2 has no meaning with strategy=ddp",
        ),
        (ParallelConfig("single", offload_optimizer=True), World(), "offload_optimizer=True has no meaning"),
    ],
)
def test_refusals(config: ParallelConfig, world: World, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_strategy(config, world, micro_batch=1)
