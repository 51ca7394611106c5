"""A run that is signalled at any moment saves, says so by its exit status, and continues as if unbroken."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dualroute.model.checkpoint.format import list_checkpoints
from dualroute.training.resilience.preemption import PREEMPTED
from tests import warm
from tests.conftest import ROOT
from tests.training.launchers import deepspeed
from tests.training.step.test_module import command, curve, environment, train, wait_for_step

STEPS = 24  # validated every 7 steps, saved every 4
PROCESSES = Path(__file__).with_name("processes")
SCRIPT = str(PROCESSES / "signalled_run.py")


@pytest.fixture(scope="module")
def unbroken(tiny_dataset, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken") / "run"
    train(tiny_dataset, output, STEPS)
    return output


def start(line, **more):
    return subprocess.Popen(
        line, cwd=ROOT, env={**environment(), "PYTHONPATH": str(ROOT), **more},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=in_the_foreground,
    )  # fmt: skip


def start_warm(line, **more):
    """The same, for tests that do not ask how a process starts; `more` as in foreground.py."""
    return warm.Started(str(PROCESSES / "foreground.py"), line[3:], cwd=ROOT, env={**environment(), **more})


def in_the_foreground():
    """As a terminal starts a command, also where the tests themselves run in the background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def finish(process, expect):
    try:
        text = "".join(part or "" for part in process.communicate(timeout=240))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a launcher's ranks too
    assert process.returncode == expect, text[-3000:]
    return text


def newest(output):
    return max((c.step for c in list_checkpoints(output / "checkpoints")), default=0)


def assert_same_curves(output, reference):
    assert curve(output) == curve(reference)
    assert curve(output, "validation") == curve(reference, "validation")


@pytest.mark.slow
def test_stopped_again_and_again_it_continues_exactly(unbroken, tiny_dataset, tmp_path):
    output = tmp_path / "run"
    line = command(tiny_dataset, output, STEPS)
    # as the sbatch template does it: what comes before Python can handle a signal is kept
    blocked = ["env", "--block-signal=USR1,TERM", *line]

    process = start(blocked)
    wait_until_blocked(process)
    process.send_signal(signal.SIGUSR1)
    assert f"SIGUSR1: stopped after step 0 of {STEPS}" in finish(process, PREEMPTED)
    assert newest(output) == 0

    process = start_warm(line)
    wait_for_step(process, output / "metrics.jsonl", 2)
    process.send_signal(signal.SIGTERM)
    text = finish(process, PREEMPTED)
    saved = newest(output)
    assert f"SIGTERM: stopped after step {saved} of {STEPS}; the same command continues" in text
    assert 2 <= saved < STEPS
    assert max(curve(output)) == saved  # nothing was trained that was not saved

    process = start_warm(line, PENDING="SIGTERM")  # a resumed start that does not come to a step
    assert f"SIGTERM: stopped after step {saved} of {STEPS}" in finish(process, PREEMPTED)
    assert newest(output) == saved

    train(tiny_dataset, output, STEPS)
    assert_same_curves(output, unbroken)


@pytest.mark.slow
def test_ctrl_c_saves_and_prints_the_command_that_continues(unbroken, tiny_dataset, tmp_path):
    output = tmp_path / "a run"
    line = command(tiny_dataset, output, STEPS)
    line[1:3] = ["-m", "dualroute"]

    process = start(line)  # among the imports
    wait_until_caught(process)
    process.send_signal(signal.SIGINT)
    text = finish(process, 130)
    assert text.strip().splitlines() == [
        "dualroute pretrain: interrupted by SIGINT: no step was taken in this start, checkpoints are as they "
        "were; the same command starts it again"
    ]
    assert not output.exists()

    process = start(line)
    wait_for_step(process, output / "metrics.jsonl", 2)
    process.send_signal(signal.SIGINT)
    text = finish(process, PREEMPTED)
    saved = newest(output)
    assert f"SIGINT: stopped after step {saved} of {STEPS}; the same command continues: " in text
    assert max(curve(output)) == saved >= 2
    assert "Traceback" not in text
    again = text.strip().rpartition("the same command continues: ")[2]
    assert shlex.split(again)[1:] == line[1:]  # the interpreter by its bare name
    assert os.path.samefile(shutil.which(shlex.split(again)[0]), sys.executable)

    process = start_warm(line)
    wait_for_step(process, output / "metrics.jsonl", saved + 2)
    process.send_signal(signal.SIGHUP)  # the terminal is closed
    text = finish(process, PREEMPTED)
    assert f"SIGHUP: stopped after step {newest(output)} of {STEPS}" in text

    train(tiny_dataset, output, STEPS)
    assert_same_curves(output, unbroken)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_it_at_once_and_spoils_nothing(unbroken, tiny_dataset, tmp_path):
    output = tmp_path / "run"
    process = start_warm(command(tiny_dataset, output, STEPS, "--checkpoint.every_steps", "1"))
    wait_for_step(process, output / "metrics.jsonl", 3)
    process.send_signal(signal.SIGSTOP)  # the second comes before the step is done
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    for _ in range(60):
        time.sleep(0.6)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) in (130, PREEMPTED)  # on a fast machine the step was done by then
    finish(process, process.returncode)
    train(tiny_dataset, output, STEPS)
    assert_same_curves(output, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["killed", "ctrl-c"])
def test_ranks_of_deepspeed_stop_with_their_launcher(unbroken, tiny_dataset, tmp_path, kind):
    """And train as one process does.

    Of its two processes the outer one passes nothing on; of a terminal's Ctrl-C all get one, ranks two.
    """
    pytest.importorskip("deepspeed")
    output = tmp_path / "run"
    arguments = command(tiny_dataset, output, 400)[4:]
    line = [sys.executable, *deepspeed(2), str(ROOT / "launch" / "pretrain.py"), *arguments]
    process = start(line, DS_ACCELERATOR="cpu")
    wait_for_step(process, output / "metrics.jsonl", 2)
    if kind == "killed":
        process.terminate()
    else:
        os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=120)  # returns when the last rank has closed its output
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    reason = (
        # the inner launcher may pass a signal on before the ranks have seen that the outer one is gone
        r"(?:the launcher \(deepspeed\.launcher\.runner, process \d+\) is gone|SIGTERM)"
        if kind == "killed"
        else "SIGINT"
    )
    stopped = re.search(rf"^{reason}: stopped after step (\d+) of 400; .* continues: (.*)$", text, re.M)
    assert stopped, text[-3000:]
    assert int(stopped[1]) == newest(output) == max(curve(output))
    assert shlex.split(stopped[2])[1:] == line[1:]
    assert text.count("stopped after step") == 1
    whole, found = curve(unbroken), curve(output)
    assert [found[step] for step in (1, 2)] == pytest.approx([whole[step] for step in (1, 2)], abs=1e-5)


def wait_until_caught(process):
    """Until the process remembers SIGUSR1, which Python itself does not."""
    mask = 0
    while not (mask >> (signal.SIGUSR1 - 1)) & 1:
        with open(f"/proc/{process.pid}/status") as status:
            mask = int(re.search(r"SigCgt:\s*(\w+)", status.read())[1], 16)


def wait_until_blocked(process):
    """Until the process has both signals blocked, which Python's main does not have any more."""
    mask = 0
    while not (mask >> (signal.SIGUSR1 - 1)) & (mask >> (signal.SIGTERM - 1)) & 1:
        with open(f"/proc/{process.pid}/status") as status:
            mask = int(re.search(r"SigBlk:\s*(\w+)", status.read())[1], 16)


def signalled(dataset, output, signals, ranks=1):
    """Of each run: its place, exit status and the step after which it stopped, None where it did not."""
    place = {**environment(), "SIGNALS": ",".join(signals)}
    text = warm.ranks(ranks, SCRIPT, command(dataset, output, STEPS)[4:], cwd=ROOT, env=place)
    outcome = []
    for place, said, status in re.findall(r"^run ([\w-]+)$(.*?)^status (\d+)$", text, re.S | re.M):
        stopped = re.search(rf"SIGUSR1: stopped after step (\d+) of {STEPS}", said)
        outcome.append((place, int(status), int(stopped[1]) if stopped else None))
    return outcome


@pytest.mark.slow
def test_every_moment_of_a_step_has_its_stop(unbroken, tiny_dataset, tmp_path):
    signals = ["micro-batch:2:all", "optimizer:6:all", "save:12:all", "validation:14:all", "end:24:all"]
    assert signalled(tiny_dataset, tmp_path / "run", signals) == [
        ("micro-batch", PREEMPTED, 3),
        ("optimizer", PREEMPTED, 7),  # a step that is validated: its validation is not left out
        ("save", PREEMPTED, 12),  # a periodic save, and not a second one
        ("validation", PREEMPTED, 14),
        ("end", 0, None),  # all steps are done: nothing to stop
    ]
    assert_same_curves(tmp_path / "run", unbroken)


@pytest.mark.slow
def test_one_signalled_rank_of_two_stops_both_at_the_same_step(tiny_dataset, tmp_path):
    pytest.importorskip("deepspeed")
    whole = signalled(tiny_dataset, tmp_path / "whole", ["nowhere:0:0"], ranks=2)
    assert whole == [("nowhere", 0, None)]
    signals = ["micro-batch:2:1", "save:8:0", "validation:14:1", "validation:24:1"]
    outcome = signalled(tiny_dataset, tmp_path / "run", signals, ranks=2)
    assert outcome == [
        ("micro-batch", PREEMPTED, 3),
        ("save", PREEMPTED, 8),
        ("validation", PREEMPTED, 14),
        ("validation", 0, None),  # the last one
    ]
    assert_same_curves(tmp_path / "run", tmp_path / "whole")
