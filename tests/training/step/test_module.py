"""The stage as a user runs it: a command, a folder, a kill, the same command again."""

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from dualroute.cli import main
from dualroute.model.checkpoint.format import find_checkpoint, list_checkpoints, load_model
from dualroute.training.monitoring.metrics_log import read_metrics
from tests import warm
from tests.conftest import ROOT

SMALL = (
    "--model.dim 32 --model.num_layers 2 --model.num_heads 4 --model.window 8 --model.block 16 "
    "--model.top_k 1 --model.global_mode routed --data.context 64 --data.val_tokens 512 "
    "--train.micro_batch 2 --train.tokens_per_batch 512 --train.val_every_steps 7 "
    "--optim.lr 0.01 --optim.warmup_steps 4 --checkpoint.every_steps 4 "
    "--monitor.log_every_steps 1 --monitor.sample_every_steps 10 --monitor.sample_tokens 8 "
    "--monitor.peak_tflops 0.1"
).split()


def command(dataset, output, steps, *more):
    return [
        *(sys.executable, "-m", "dualroute.cli", "pretrain", *SMALL),
        *("--data.path", str(dataset), "--output", str(output), "--train.max_steps", str(steps), *more),
    ]


def environment():
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def attempt(dataset, output, steps, *more, script=None):
    """The command, or a script with its arguments, whatever comes of it."""
    words = command(dataset, output, steps, *more)[3:]
    return warm.run(words, cwd=ROOT, env=environment(), script=script)


def started(dataset, output, steps, *more):
    """The command, which runs on and can be signalled."""
    return warm.Started(None, command(dataset, output, steps, *more)[3:], cwd=ROOT, env=environment())


def train(dataset, output, steps, *more):
    result = attempt(dataset, output, steps, *more)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def curve(output, event="train"):
    """{step: loss} at full precision; every step stands in the file once."""
    lines = read_metrics(Path(output) / "metrics.jsonl", event)
    name = "train/loss" if event == "train" else "val/loss"
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line[name] for line in lines}


@pytest.fixture(scope="module")
def unbroken(tiny_dataset, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken") / "run"
    train(tiny_dataset, output, 24)
    return output


GENTLE = ("--optim.lr", "0.003")  # at 0.01 a step of this run amplifies rounding, on some processors to 2e-4


@pytest.fixture(scope="module")
def gentle(tiny_dataset, tmp_path_factory):
    """Losses of a run that another way of computing is compared with."""
    output = tmp_path_factory.mktemp("gentle") / "run"
    train(tiny_dataset, output, 24, *GENTLE)
    return curve(output)


@pytest.mark.slow
def test_a_run_learns_and_leaves_what_it_promises(unbroken):
    losses = curve(unbroken)
    assert sorted(losses) == list(range(1, 25))
    assert losses[24] < losses[1] - 1.0
    assert sorted(curve(unbroken, "validation")) == [0, 7, 14, 21, 24]
    checkpoint = find_checkpoint(unbroken)
    assert checkpoint.step == 24
    assert checkpoint.val_loss == curve(unbroken, "validation")[24]
    assert load_model(checkpoint).config.dim == 32
    folder = unbroken / "checkpoints"
    assert (folder / "last").resolve() == checkpoint.folder
    # the two newest stay, and the best by validation loss (the last one here)
    assert [c.step for c in list_checkpoints(folder)] == [20, 24]
    assert not list(folder.glob(".*"))
    assert any((unbroken / "tensorboard").glob("events.*"))


@pytest.mark.slow
def test_killed_three_times_it_continues_as_if_nothing_had_happened(unbroken, tiny_dataset, tmp_path):
    output = tmp_path / "run"
    for until in (6, 13, 18):
        process = started(tiny_dataset, output, 24)
        wait_for_step(process, output / "metrics.jsonl", until)
        process.kill()
    train(tiny_dataset, output, 24)
    assert curve(output) == curve(unbroken)
    assert curve(output, "validation") == curve(unbroken, "validation")


def wait_for_step(process, path, step):
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        text = path.read_text() if path.exists() else ""
        if any(f'"step": {reached}, "event": "train"' in text for reached in (step, step + 1)):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.slow
def test_run_again_when_done_it_changes_nothing(unbroken, tiny_dataset):
    before = {p: p.stat().st_mtime_ns for p in unbroken.rglob("*") if p.is_file()}
    result = train(tiny_dataset, unbroken, 24)
    assert "nothing to do" in result.stdout
    assert before == {p: p.stat().st_mtime_ns for p in unbroken.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_how_a_batch_is_divided_does_not_change_the_losses(gentle, tiny_dataset, tmp_path):
    other_way = ["--train.micro_batch", "8", "--train.activation_checkpointing", "full"]
    train(tiny_dataset, tmp_path / "run", 24, *GENTLE, *other_way)
    other = curve(tmp_path / "run")
    assert max(abs(other[s] - gentle[s]) for s in gentle) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_it_trains_as_ever(gentle, tiny_dataset, tmp_path):
    train(tiny_dataset, tmp_path / "run", 24, *GENTLE, "--train.compile", "true")
    other = curve(tmp_path / "run")
    assert max(abs(other[s] - gentle[s]) for s in gentle) < 1e-4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--parallel.zero_stage", "3", "--train.compile", "true"),
            "cannot be used with parallel.zero_stage 3",
        ),
        (("--train.precision", "fp8", "--parallel.zero_stage", "3"), "use stage 2, or bf16-mixed"),
        (("--train.precision", "fp8", "--train.quantization_aware", "int8_weight_only"), "or leave it out"),
        (("--train.recompute_every_layers", "0"), "train.recompute_every_layers is 0"),
        (("--train.offload_activations", "true"), "from a CUDA device"),
        (("--parallel.sequence_parallel", "2"), "does not divide the 1 rank"),
        (("--train.precision", "16-mixed"), "or parallel.strategy deepspeed: use bf16-mixed"),
    ],
)
def test_settings_that_cannot_work_here_are_refused_by_name(more, message, tiny_dataset, tmp_path, capsys):
    arguments = command(tiny_dataset, tmp_path / "run", 24, *more)[3:]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_bf16_follows_float32_and_z_loss_is_logged(unbroken, tiny_dataset, tmp_path):
    more = ["--train.precision", "bf16-mixed", "--train.z_loss", "1e-4"]
    train(tiny_dataset, tmp_path / "run", 24, *more)
    other, reference = curve(tmp_path / "run"), curve(unbroken)
    # later the small difference of the arithmetic grows with the steep fall of the loss
    assert max(abs(other[s] - reference[s]) for s in range(1, 10)) < 0.01
    assert other != reference
    assert other[24] < other[1] - 1.0
    squared = [line["train/z_loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl", "train")]
    # at the start logits are near 0, so the normaliser is near log(vocabulary)
    assert squared[0] == pytest.approx(math.log(320) ** 2, rel=0.05)


@pytest.mark.slow
def test_the_resolved_configuration_runs_again_as_it_is(unbroken, tmp_path):
    words = ["pretrain", "--config", unbroken / "config.yaml", "--output", tmp_path / "again"]
    result = warm.run([*words, "--train.max_steps", "6"], cwd=ROOT, env=environment())
    assert result.returncode == 0, result.stderr[-3000:]
    first = {step: loss for step, loss in curve(unbroken).items() if step <= 4}
    assert {step: loss for step, loss in curve(tmp_path / "again").items() if step <= 4} == first


@pytest.mark.slow
def test_the_metadata_is_written_last_and_names_every_file(unbroken):
    checkpoint = find_checkpoint(unbroken)
    metadata = json.loads((checkpoint.folder / "checkpoint.json").read_text())
    files = {str(p.relative_to(checkpoint.folder)) for p in checkpoint.folder.rglob("*") if p.is_file()}
    assert set(metadata["files"]) == files - {"checkpoint.json"}
    newest = max(checkpoint.folder.iterdir(), key=lambda p: p.stat().st_mtime_ns)
    assert newest.name == "checkpoint.json"


def test_a_run_may_begin_with_the_weights_of_another(tiny_dataset, tmp_path, capsys):
    """Shape and weights come from there; optimizer, step and data's order begin anew."""
    parent = tmp_path / "parent"
    assert main(command(tiny_dataset, parent, 7)[3:]) == 0
    pairs = zip(SMALL[::2], SMALL[1::2], strict=True)
    options = [word for flag, value in pairs if not flag.startswith("--model.") for word in (flag, value)]

    def begin(name, *more):
        return main(
            ["pretrain", *options, "--data.path", str(tiny_dataset), "--output", str(tmp_path / name),
             "--train.max_steps", "7", "--init_from", str(parent), *more]
        )  # fmt: skip

    assert begin("second") == 0
    second = curve(tmp_path / "second", "validation")
    assert second[0] == pytest.approx(curve(parent, "validation")[7], abs=1e-6)
    assert second.keys() == {0, 7}
    # what has no weights may be another
    assert begin("narrow", "--model.window", "4") == 0
    assert load_model(find_checkpoint(tmp_path / "narrow")).config.window == 4
    assert curve(tmp_path / "narrow", "validation")[0] != second[0]
    capsys.readouterr()
    assert begin("wide", "--model.dim", "48") == 2
    assert "model.dim is 48 and the weights of init_from" in capsys.readouterr().err
