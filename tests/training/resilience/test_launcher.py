"""What stands above a rank: which processes are its launcher, and what is noticed when they go."""

import contextlib
import os
import signal
import subprocess
import sys

import psutil
import pytest

from dualroute.training.resilience import launcher, stop_signal
from tests.conftest import ROOT

LAUNCHERS = [
    "/opt/venv/bin/torchrun --nproc_per_node 2 launch/pretrain.py",
    "/opt/venv/bin/python3.11 /opt/venv/bin/torchrun launch/pretrain.py",
    "python -u -m torch.distributed.run launch/pretrain.py",
    "/opt/venv/bin/python /opt/venv/bin/deepspeed launch/pretrain.py",
    "/opt/venv/bin/python -u -m deepspeed.launcher.launch --world_info=x launch/pretrain.py",
]
OTHERS = [
    "",
    "bash",
    "/bin/bash -c torchrun launch/pretrain.py",
    "nohup torchrun launch/pretrain.py",
    "python -m pytest tests/deepspeed",
    "python launch/pretrain.py deepspeed",
    "slurmstepd: [12.0]",
]


@pytest.mark.parametrize("words", [*LAUNCHERS, *OTHERS])
def test_a_launcher_is_told_by_its_command_line(words):
    assert launcher._is_launcher(words.split()) == (words in LAUNCHERS)


def test_only_what_stands_between_a_rank_and_its_launcher_is_watched(monkeypatch):
    """deepspeed, started by a shell under nohup: the shell may go."""
    chain = ["bash rank.sh", LAUNCHERS[4], LAUNCHERS[3], "bash", "sshd"]
    above = [type("Process", (), {"cmdline": lambda self, line=line: line.split()})() for line in chain]
    monkeypatch.setattr(psutil.Process, "parents", lambda self: above)
    assert launcher.launchers() == above[:3]
    monkeypatch.setattr(psutil.Process, "parents", lambda self: above[3:])
    assert launcher.launchers() == []
    assert launcher.watch_launcher() is None


RANK = """
import sys, time
from dualroute.training.resilience import launcher, stop_signal
launcher.watch_launcher(0.05)
print(launcher.command_line(), flush=True)
while not stop_signal.received():
    time.sleep(0.02)
print(stop_signal.reason(), flush=True)
"""


@pytest.mark.parametrize("gone", ["outer", "inner"])
def test_a_rank_notices_that_its_launcher_was_killed(gone, tmp_path):
    """As `deepspeed` is built: a runner that starts a launcher that starts the rank."""
    (tmp_path / "rank.py").write_text(RANK)
    start = "import subprocess, sys\nprint(subprocess.Popen([sys.executable, *{}]).wait())\n"
    (tmp_path / "torchrun").write_text(start.format([str(tmp_path / "rank.py")]))
    (tmp_path / "deepspeed").write_text(start.format([str(tmp_path / "torchrun"), "a b"]))
    outer = subprocess.Popen(
        [sys.executable, str(tmp_path / "deepspeed"), "--flag", "a b"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert outer.stdout.readline().strip().endswith("/deepspeed --flag 'a b'")
        inner = psutil.Process(outer.pid).children()[0]
        ranks = inner.children()
        chosen = psutil.Process(outer.pid) if gone == "outer" else inner
        chosen.send_signal(signal.SIGKILL)
        name = "deepspeed" if gone == "outer" else "torchrun"
        # of the inner one the runner prints the status first
        said = [outer.stdout.readline() for _ in range(1 if gone == "outer" else 2)]
        assert f"the launcher ({name}, process {chosen.pid}) is gone\n" in said
    finally:
        for process in [outer, *ranks, inner]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        outer.wait()


def test_what_was_asked_first_is_the_reason(monkeypatch):
    monkeypatch.setattr(stop_signal, "_received", 0)
    monkeypatch.setattr(stop_signal, "_reason", "")
    stop_signal.ask(signal.SIGTERM, "the launcher is gone")
    stop_signal.ask(signal.SIGHUP, "something else")
    assert (stop_signal.received(), stop_signal.reason()) == (signal.SIGTERM, "the launcher is gone")


def test_the_command_to_type_again_is_the_short_one(monkeypatch, tmp_path):
    program = tmp_path / "dualroute"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(launcher, "launchers", list)
    words = ["/opt/python", str(program), "pretrain", "--output", "a run"]
    for given, wanted in [
        (words, "dualroute pretrain --output 'a run'"),
        (words[1:], "dualroute pretrain --output 'a run'"),
        (["python", "-m", "dualroute", "pretrain"], "python -m dualroute pretrain"),
        (["/opt/python", "/elsewhere/dualroute", "pretrain"], "/opt/python /elsewhere/dualroute pretrain"),
    ]:
        launcher.command_line.cache_clear()
        monkeypatch.setattr(sys, "orig_argv", given)
        assert launcher.command_line() == wanted
    launcher.command_line.cache_clear()
