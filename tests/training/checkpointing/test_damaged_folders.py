"""Every file of a checkpoint, damaged in every way, under every command that reads one.

The rule: one line that names the trouble and status 2 (1 where checkpoints are listed or verified), or the
command does not read that file and is right without it.  No traceback, no waiting, nothing changed.
"""

import contextlib
import hashlib
import io
import os
import shutil
import signal

import pytest

from dualroute.cli import main
from dualroute.export.hf import folder as huggingface
from dualroute.model.checkpoint.format import find_checkpoint
from tests.sealed import redescribe
from tests.training.checkpointing.state.elastic_runs import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FILES = ("model.json", "model.safetensors", "tokenizer.model", "state.ckpt", "checkpoint.json")


def train(data, output, steps, *more):
    arguments = [*SMALL, "--data.path", str(data), "--output", str(output), "--train.max_steps", str(steps)]
    return ["pretrain", *arguments, "--optim.warmup_steps", "1", *more]


@pytest.fixture(scope="module")
def runs(tiny_dataset, tmp_path_factory):
    """Two runs of models of different shapes."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(train(tiny_dataset, folder / "one", 2)) == 0
    assert main(train(tiny_dataset, folder / "other", 2, "--model.dim", "48", "--model.num_layers", "2")) == 0
    return folder


def commands(data, run, out):
    """{name: (arguments, files that it reads)}"""
    model = {"model.json", "model.safetensors", "tokenizer.model", "checkpoint.json"}
    every = set(FILES)
    context = ["--context", "64"]
    return {
        "list": (["checkpoint", "list", run], {"checkpoint.json"}),
        "verify": (["checkpoint", "verify", run], every),
        "export": (["checkpoint", "export", run, "--output", out], every),
        "convert": (["checkpoint", "convert", run, "--output", out], every),
        "resume": (train(data, run, 3), every),
        "init_from": (train(data, out, 2, "--init_from", run), model),
        "evaluate": (
            ["evaluate", "--checkpoint", run, "--data", data, "--max_tokens", "64", *context], model,
        ),
        "generate": (["generate", "--checkpoint", run, "--sampling.max_new_tokens", "2"], model),
        "quantize": (["quantize", "--checkpoint", run, "--output", out], model),
        "prune": (
            ["prune", "--checkpoint", run, "--output", out, "--data", data, "--keep", "0.9",
             "--calibration_tokens", "128", *context],
            model,
        ),
        "hf": (["export", "--checkpoint", run, "--format", "hf", "--output", out], model),
        "cache-logits": (
            ["cache-logits", "--teacher", run, "--data.path", data, "--data.context", "64",
             "--max_tokens", "64", "--output", out],
            model,
        ),
    }  # fmt: skip


def damage(path, how, other):
    content = path.read_bytes()
    path.unlink()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "flipped":
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
    elif how == "a folder":
        path.mkdir()
    elif how == "dangling":
        path.symlink_to("nowhere")
    elif how == "a pipe":
        os.mkfifo(path)
    elif how == "another's":
        shutil.copyfile(other, path)
    elif how == "nested":
        path.write_text("[" * 100_000)
    elif how == "huge":
        with path.open("wb") as stream:
            stream.truncate(2**40)
    elif how != "missing":
        path.write_text(how)


def snapshot(folder):
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = os.readlink(path)
        elif path.is_file() and path.stat().st_size < 2**30 and path.parent.name != "heartbeats":
            found[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {str(path.relative_to(folder)): value for path, value in found.items() if path.name != ".lock"}


class Waits(BaseException):
    """No Exception: nothing may take it for an error of its own."""


@contextlib.contextmanager
def no_waiting(seconds):
    def ring(*_):
        raise Waits

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(arguments):
    """Exit status and the lines on standard error."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), no_waiting(120):
        status = main([str(word) for word in arguments])
    return status, [line for line in said.getvalue().splitlines() if ": error" in line], said.getvalue()


WAYS = ["truncated", "emptied", "flipped", "a folder", "dangling", "a pipe", "another's", "missing"]
OF_JSON = ["nested", "huge", "null", "[]", "5", "{}", '{"step": null}', '{"step": 2, "files": 5}']
CASES = [(file, how, False) for file in FILES for how in WAYS]
CASES.remove(("tokenizer.model", "another's", False))  # both runs have the same
CASES += [("checkpoint.json", how, False) for how in OF_JSON]
CASES += [(file, how, True) for file in FILES[:4] for how in ("truncated", "flipped", "another's")]
CASES.remove(("tokenizer.model", "another's", True))
CASES += [("model.json", how, True) for how in ("null", "5", '{"dim": "x"}', '{"dim": -1}', "nested")]


@pytest.fixture(autouse=True)
def unverified(monkeypatch):
    """No Python of its own loads the export: seconds each, and it does not read the checkpoint."""
    right = {"logits": {"5": 0.0}, "texts": 1, "texts_differing": [], "generation": {"1": True}}
    monkeypatch.setattr(huggingface, "run_check", lambda *_: dict(right))


@pytest.mark.parametrize(("file", "how", "mended"), CASES)
def test_one_line_and_nothing_changed(runs, tiny_dataset, tmp_path, file, how, mended):
    run = shutil.copytree(runs / "one", tmp_path / "run", symlinks=True)
    folder = find_checkpoint(run).folder
    damage(folder / file, how, find_checkpoint(runs / "other").folder / file)
    if mended:  # by somebody who means it, or the disk was damaged before the file was described
        redescribe(folder, file)
    before, wrong = snapshot(run), []
    readers_only = how not in ("truncated", "missing", "a pipe")  # what never opens it sees no difference
    kept = shutil.copytree(run, tmp_path / "kept", symlinks=True) if how not in ("a pipe", "huge") else None
    for name, (arguments, reads) in commands(tiny_dataset, run, tmp_path / "out").items():
        if file not in reads and readers_only:
            continue
        try:
            status, lines, said = attempt(arguments)
        except BaseException as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
            continue
        finally:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
        if "Traceback" in said:
            wrong.append(f"{name}: a traceback: {said[-500:]}")
        elif status == 2 and len(lines) != 1:
            wrong.append(f"{name}: {len(lines)} lines: {said[-500:]}")
        elif status == 0 and file in reads and not mended and name != "list":
            wrong.append(f"{name}: took it")
        elif status not in (0, 1, 2) or (status == 1 and name not in ("list", "verify")):
            wrong.append(f"{name}: status {status}")
        after = snapshot(run)
        if status == 0 and kept is not None:  # it does not read that file and has gone on, as it should
            shutil.rmtree(run)
            shutil.copytree(kept, run, symlinks=True)
        elif after != before:
            wrong.append(f"{name}: changed {[n for n in {*after, *before} if after.get(n) != before.get(n)]}")
            shutil.rmtree(run)
            break
    assert not wrong, "\n".join(wrong)
