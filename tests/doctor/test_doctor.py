"""``dualroute doctor`` alone and on two ranks, and each verdict on a machine that is not sound."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from dualroute.attention import backend
from dualroute.attention.backends.cpp import build
from dualroute.attention.verification import Decision, Finding
from dualroute.cli import parse_stage
from dualroute.doctor import kernels, machine, network
from dualroute.doctor.smoke import run, smoke
from dualroute.doctor.verdict import Verdict, guarded, ok
from dualroute.errors import UserError
from tests.attention.verification.doubles import no_triton
from tests.conftest import ROOT
from tests.training.launchers import torchrun
from tests.training.step.test_module import environment

QUICK = ("--no-kernels", "--disk_mib", "8", "--network_mib", "1")


def levels(verdicts: Iterable[Verdict]) -> dict[str, str]:
    return {verdict.name: verdict.level for verdict in verdicts}


def test_switches_of_the_command_line() -> None:
    assert parse_stage("doctor", []).smoke
    assert not parse_stage("doctor", ["--no-smoke"]).smoke
    assert not parse_stage("doctor", ["--smoke", "false"]).smoke
    assert parse_stage("doctor", ["--no-smoke", "--smoke", "--output", "x"]).smoke
    with pytest.raises(UserError, match="unknown key"):
        parse_stage("doctor", ["--no-smok"])


@pytest.mark.slow
def test_alone_it_lets_two_processes_talk(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "dualroute.cli", "doctor", "--no-smoke", "--output", str(tmp_path), *QUICK],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(line.startswith(("ok ", "warn ")) for line in lines)
    found = {line.split()[1] for line in lines}
    assert found >= {"python", "torch", "lightning", "devices", "memory", "ranks", "clocks", "bandwidth"}
    assert any("2 on 1 host(s)" in line for line in lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_ranks_of_a_launcher_examine_each_other(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, *torchrun(2), "launch/doctor.py", "--no-smoke"),
            *("--output", str(tmp_path), *QUICK),
        ],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert len([line for line in result.stdout.splitlines() if " bandwidth " in line]) == 1
    assert "over 1 pair(s), gloo" in result.stdout


@pytest.mark.slow
def test_the_smoke_training_learns_and_a_broken_one_is_a_verdict() -> None:
    assert levels(smoke()) == {"smoke": "ok"}
    assert "exit status 2" in run(("pretrain", "--no-such-key", "1"), 100)


def test_a_disk_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (verdict,) = machine.disk(tmp_path / "file", 1)
    assert verdict.level == "FAIL"
    assert "file" in verdict.found
    assert levels(machine.disk(tmp_path / "new", 1)).keys() == {"disk room", "disk speed"}
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("lightning", "deepspeed", "expected"),
    [
        ("2.6.2", "0.19.8", {"lightning": "FAIL", "deepspeed": "ok"}),
        ("2.5.0", None, {"lightning": "FAIL", "deepspeed": "warn"}),
        ("2.10.0", "0.9.0", {"lightning": "ok", "deepspeed": "FAIL"}),
    ],
)
def test_versions_are_compared_as_numbers(
    monkeypatch: pytest.MonkeyPatch, lightning: str, deepspeed: str | None, expected: dict[str, str]
) -> None:
    monkeypatch.setattr(machine, "installed", {"lightning": lightning, "deepspeed": deepspeed}.get)
    found = levels(machine.versions())
    assert {name: found[name] for name in expected} == expected


def test_a_driver_without_a_visible_gpu_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "nvidia_driver", lambda: "550.1")
    (verdict,) = machine.devices()
    assert verdict.level == "FAIL"
    assert "550.1" in verdict.found


def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    Memory = namedtuple("Memory", "available total")
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: Memory(machine.GIB, 8 * machine.GIB))
    assert levels(machine.memory())["memory"] == "warn"


def test_kernels_that_cannot_be_compiled_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    (fine,) = machine.attention_kernels()
    assert fine.level == "ok"
    build.load.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (missing,) = machine.attention_kernels()
    assert missing.level == "warn"
    assert "there is no C++ compiler: install g++" in str(missing)


@pytest.mark.slow
def test_kernels_are_compared_on_the_shapes_of_the_recipes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    build.load()  # in the usual cache
    monkeypatch.setenv(build.CACHE, str(tmp_path))
    monkeypatch.setattr(backend, "_triton", no_triton)
    table: dict[str, Decision] = {}
    (verdict,) = kernels.kernels(table, ("160m",))
    assert verdict.level == "ok"
    assert verdict.found.startswith("160m: ")
    for words in ("the fastest of what is right here", "cpp", "triton not: "):
        assert words in verdict.found
    kernels.show(table)
    printed = capsys.readouterr().out
    assert "│ 160m   │ " in printed
    assert "errors of values, gradients" in printed
    assert {
        name: len(kernels.recipe_problems(name, torch.device("cuda"))) for name in kernels.RECIPES
    } == dict.fromkeys(kernels.RECIPES, 1)
    (seven,) = kernels.recipe_problems("7b", torch.device("cuda"))
    assert (seven.global_heads, seven.group, seven.head_dim, seven.context, seven.dtype) == (
        16,
        4,
        128,
        16384,
        "bfloat16",
    )


def test_wrong_kernels_are_a_failure_with_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Finding("triton", why_not="WRONG, local values off by 1.0e-02 of the whole, 2.0e-04 may be")
    found = Decision("torch", (Finding("torch", 9.0), wrong, Finding("cpp", why_not="it does not take cuda")))
    monkeypatch.setattr(kernels, "compared", lambda problems, target, fresh: found)
    (verdict,) = kernels.kernels({}, ("160m",))
    assert verdict.level == "FAIL"
    assert "160m: triton: WRONG, local values off" in verdict.found
    assert "cpp" not in verdict.found
    assert "auto takes torch" in verdict.remedy


def test_only_an_old_lock_is_stale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "op").mkdir()
    lock = tmp_path / "op" / "lock"
    lock.touch()
    assert machine.stale_locks() == []
    os.utime(lock, (time.time() - 3600,) * 2)
    assert machine.stale_locks() == [lock]


def test_pairs_of_many_ranks_are_few_and_reach_every_rank() -> None:
    assert network.pairs_of(2) == [(0, 1)]
    assert len(network.pairs_of(8)) == 28
    many = network.pairs_of(64)
    assert len(many) == 96
    assert {rank for pair in many for rank in pair} == set(range(64))


def test_an_error_of_a_check_is_a_verdict_and_the_next_goes_on() -> None:
    def broken() -> Iterable[Verdict]:
        yield ok("a", "fine")
        raise RuntimeError("no such thing")

    first, second = guarded("x", broken)
    assert (first.level, second.level) == ("ok", "FAIL")
    assert "no such thing" in second.found
    assert "\n" not in str(second)
