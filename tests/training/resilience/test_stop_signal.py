"""What a signal does to a process, before, during and after what it can save; without a training, which takes
seconds to start."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from dualroute.cli import STAGES, run_or_explain
from dualroute.errors import Interrupted
from dualroute.training.resilience import stop_signal
from tests.conftest import ROOT

BEGIN = """
import contextlib, hashlib, os, signal, sys, time
from dualroute.errors import Interrupted
from dualroute.training.resilience import stop_signal
stop_signal.install()
def ready():
    print("ready", flush=True)
def wait_for_signal():
    while not stop_signal.received():
        time.sleep(0.01)
"""


@contextlib.contextmanager
def process(script, *, ignored=(), **environment):
    """A process that runs BEGIN and ``script``, once it has called ready()."""

    def handlers():  # as a terminal's foreground command has them, whatever runs the tests
        for number in stop_signal.TERMINAL_SIGNALS:
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    kept = {key: value for key, value in os.environ.items() if key != "RANK"}
    started = subprocess.Popen(
        [sys.executable, "-c", BEGIN + script],
        cwd=ROOT, env={**kept, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=handlers,
    )  # fmt: skip
    try:
        assert started.stdout.readline() == "ready\n"
        time.sleep(0.1)  # until it has returned from printing that
        yield started
    finally:
        started.kill()
        started.communicate()


def ended(started, *signals):
    for number in signals:
        started.send_signal(number)
    out, err = started.communicate(timeout=20)
    return started.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_start_ends_once_and_also_where_a_library_takes_the_exception(number):
    script = """
try:
    ready()
    time.sleep(20)
except BaseException as error:  # as some imports do
    print("taken", type(error).__name__, flush=True)
time.sleep(0.3)  # a second one of the same moment, which must not break what tidies up
try:
    stop_signal.check_start()
except Interrupted as error:
    print("again", error.number)
"""
    with process(script) as started:
        assert ended(started, number) == (0, f"taken Interrupted\nagain {int(number)}\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1])
def test_while_it_trains_a_signal_is_remembered(number):
    script = """
stop_signal.training_begins()
ready()
wait_for_signal()
print(stop_signal.reason())
"""
    with process(script) as started:
        status, out, _ = ended(started, number)
    assert (status, out) == (0, f"{number.name}\n")


def test_the_second_interrupt_ends_it_even_inside_c_code():
    script = """
stop_signal.training_begins()
ready()
hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)  # minutes, in which no Python handler runs
"""
    with process(script) as started:
        started.send_signal(signal.SIGINT)
        time.sleep(0.8)
        assert started.poll() is None
        status, _, err = ended(started, signal.SIGINT)
    assert status == 130
    assert "stops after the step that runs" in err
    assert "stopped at once" in err


@pytest.mark.parametrize("more", [{}, {"RANK": "1"}], ids=["alone", "rank"])
def test_an_interrupt_that_is_passed_on_as_well_is_one(more):
    """Terminal and launcher both send it to a rank, and deepspeed SIGTERM behind it."""
    script = """
stop_signal.training_begins()
ready()
wait_for_signal()
time.sleep(1.5)
print(stop_signal.reason())
"""
    with process(script, **more) as started:
        started.send_signal(signal.SIGINT)
        time.sleep(0.9 if more else 0.1)
        status, out, err = ended(started, signal.SIGINT, signal.SIGTERM)
    assert (status, out) == (0, "SIGINT\n")
    assert ("stops after the step" in err) == (not more)  # one rank says it


def test_what_nohup_and_a_background_job_ignore_stays_ignored():
    script = """
ready()
time.sleep(0.5)
print("went on", stop_signal.received())
"""
    with process(script, ignored=stop_signal.TERMINAL_SIGNALS) as started:
        assert ended(started, signal.SIGHUP, signal.SIGINT)[:2] == (0, "went on 0\n")


def test_a_forked_process_leaves_the_signal_to_its_parent():
    """Those that read data: Ctrl-C in a terminal reaches them too, and the step still needs their batches."""
    script = """
stop_signal.training_begins()
child = os.fork()
if child == 0:
    time.sleep(1.0)
    os._exit(7 + stop_signal.received())
ready()
wait_for_signal()
os.kill(child, signal.SIGINT)
os.kill(child, signal.SIGINT)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    with process(script) as started:
        assert ended(started, signal.SIGINT)[:2] == (0, "7\n")


def test_a_reader_that_is_gone_ends_no_training():
    """``dualroute pretrain … | tee log`` and Ctrl-C, which ends tee at once."""
    script = """
stop_signal.training_begins()
ready()
wait_for_signal()
time.sleep(0.3)
for _ in range(3):
    print("a line" * 10_000, flush=True)
    print("a line", file=sys.stderr)
sys.exit(75)
"""
    with process(script) as started:
        started.send_signal(signal.SIGINT)
        started.stdout.close()
        started.stderr.close()
        assert started.wait(timeout=20) == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_another_command_tidies_up_before_it_ends(number):
    script = """
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
stop_signal.interrupt()
child = os.fork()
try:
    if child:
        ready()
    time.sleep(20)
except Interrupted as error:
    assert child
    print("tidied up", error.number)
    os.kill(child, error.number)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    with process(script) as started:
        assert ended(started, number)[:2] == (0, f"tidied up {int(number)}\n-{int(number)}\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted(signal.SIGTERM)])
@pytest.mark.parametrize("command", [*STAGES, "checkpoint", "submit"])
def test_each_command_says_in_one_line_what_is_kept(command, error, monkeypatch, capsys):
    def interrupted(arguments):
        raise error

    monkeypatch.setattr("dualroute.cli.entry.run", interrupted)
    number = signal.SIGTERM if isinstance(error, Interrupted) else signal.SIGINT
    assert run_or_explain([command]) == 128 + number
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"dualroute {command}: interrupted by {number.name}")
    assert printed.err.count("\n") == 1
    kept = ("prepare", "cache-logits", "pipeline", "pretrain", "distill", "finetune", "predict")
    assert (command in kept) == ("same command" in printed.err)


def test_a_signal_among_the_imports_is_one_line_too(capsys):
    with pytest.raises(SystemExit) as ended, stop_signal.one_line("evaluate"):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "dualroute evaluate: interrupted by SIGINT\n"
