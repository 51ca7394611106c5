"""The stage on real ranks against one process: under torchrun, and many more without a launcher.

DeepSpeed's launcher is in test_hostfile.py, for several nodes, and in resilience/test_preemption.py.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from dualroute.model.checkpoint.format import find_checkpoint, load_model
from tests import warm
from tests.conftest import ROOT
from tests.training.launchers import torchrun
from tests.training.step.test_module import SMALL, curve, environment, train

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

STEPS = 12  # saved every 4, validated every 7
# A stable run: near the largest learning rate that works, one step can amplify rounding tenfold.
STABLE = ("--monitor.sample_every_steps", "12", "--optim.lr", "0.003")


def launch(launcher, dataset, output, steps, *more):
    """What the ranks print that ``launcher`` starts."""
    process = subprocess.Popen(
        [sys.executable, *launcher, "launch/pretrain.py", *arguments(dataset, output, steps, *more)],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=280)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the launcher and its ranks, whatever happened
    assert process.returncode == 0, text[-3000:]
    return text


def launch_warm(ranks, dataset, output, steps, *more):
    words = arguments(dataset, output, steps, *more)
    return warm.ranks(ranks, "launch/pretrain.py", words, cwd=ROOT, env=environment())


def arguments(dataset, output, steps, *more):
    run = ["--data.path", str(dataset), "--output", str(output), "--train.max_steps", str(steps)]
    return [*SMALL, *STABLE, *run, *more]


@pytest.fixture(scope="module")
def alone(tiny_dataset, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "run"
    train(tiny_dataset, output, STEPS, *STABLE)
    return output


def assert_same_losses(output, reference):
    for event in ("train", "validation"):
        theirs, ours = curve(output, event), curve(reference, event)
        assert theirs.keys() == ours.keys()
        assert max(abs(theirs[s] - ours[s]) for s in ours) <= 1e-5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_with_zero_train_as_one_process_does(alone, tiny_dataset, tmp_path, stage):
    output = tmp_path / "run"
    zero = ("--parallel.zero_stage", str(stage))
    launch_warm(2, tiny_dataset, output, STEPS, *zero)
    assert_same_losses(output, alone)
    # what was sharded is whole again in the published weights
    ours, theirs = load_model(find_checkpoint(alone)), load_model(find_checkpoint(output))
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (a - b).abs().max() < 1e-3, name


@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (2, 3), (4, 2)])
def test_ranks_that_share_texts_train_as_one_process_does(alone, tiny_dataset, tmp_path, ranks, stage):
    output = tmp_path / "run"
    more = ("--parallel.zero_stage", str(stage), "--parallel.sequence_parallel", "2")
    launch_warm(ranks, tiny_dataset, output, STEPS, *more)
    assert_same_losses(output, alone)


def test_a_second_partition_beside_shared_texts_and_a_resume_without_either(alone, tiny_dataset, tmp_path):
    output, settings = tmp_path / "run", tmp_path / "settings.yaml"
    settings.write_text("zero_optimization: {stage3_param_persistence_threshold: 0}\n")  # partition all
    more = ("--parallel.zero_stage", "3", "--parallel.deepspeed_config", str(settings))
    more += ("--checkpoint.keep_last", "9")
    groups = ("--parallel.zero_hpz_partition_size", "2", "--parallel.sequence_parallel", "2")
    launch_warm(4, tiny_dataset, output, STEPS, *more, *groups)
    assert_same_losses(output, alone)
    for step in (8, 12):
        shutil.rmtree(output / "checkpoints" / f"step-{step:08d}")
    launch_warm(2, tiny_dataset, output, STEPS, *more)
    assert_same_losses(output, alone)


def test_two_ranks_stop_and_resume_exactly(alone, tiny_dataset, tmp_path):
    output = tmp_path / "run"
    # the schedule is that of all steps; a kill cannot be placed exactly, so later checkpoints are taken away
    launch(torchrun(2), tiny_dataset, output, STEPS, "--checkpoint.keep_last", "9")
    whole = curve(output)
    for step in (8, 12):
        subprocess.run(["rm", "-r", str(output / "checkpoints" / f"step-{step:08d}")], check=True)
    text = launch_warm(2, tiny_dataset, output, STEPS, "--checkpoint.keep_last", "9")
    assert f"step 4 of {STEPS}" in text
    assert curve(output) == whole
    assert_same_losses(output, alone)


def test_a_taken_port_is_named(tiny_dataset, tmp_path):
    rank_0 = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "CROSS_RANK": "0", "LOCAL_SIZE": "2"}
    words = arguments(tiny_dataset, tmp_path / "run", 8)
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        place = {**environment(), **rank_0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = warm.run(["pretrain", *words], cwd=ROOT, env=place)
    assert done.returncode == 2
    assert f"port {port}" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
