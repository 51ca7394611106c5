"""The library from Python: values and results are those of the commands, imports come when they are used."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import dualroute as dr
import dualroute.library
from dualroute.cli import parse_stage
from dualroute.evaluate.config import EvaluateConfig
from dualroute.evaluate.perplexity import evaluate
from dualroute.library.options import configuration
from dualroute.training.config import PretrainConfig
from dualroute.training.resilience import stop_signal
from tests.conftest import ROOT

SHAPE = {"dim": 32, "num_layers": 1, "num_heads": 2, "block": 16, "window": 16}
TINY = {
    "model": SHAPE,
    "train": {"micro_batch": 2, "tokens_per_batch": 256, "max_steps": 3},
    "optim": {"warmup_steps": 1},
    "monitor": {"peak_tflops": 0.1, "sample_every_steps": 0},
}


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory):
    """A run of three steps."""
    output = tmp_path_factory.mktemp("library") / "run"
    return dr.train(TINY, output=output, data={"path": tiny_dataset, "context": 64})


@pytest.fixture(scope="module")
def model(run):
    return dr.load(run.folder)


def test_importing_is_free_of_torch_and_finds_every_name():
    script = (
        "import sys, time; t = time.perf_counter(); import dualroute as dr; spent = time.perf_counter() - t\n"
        "assert not {'torch', 'numpy', 'yaml', 'lightning'} & {*sys.modules}\n"
        "assert set(dr.__all__) <= set(dir(dr)); [getattr(dr, name) for name in dr.__all__]\n"
        "assert 'torch' not in sys.modules\n"
        "assert spent < 0.5, spent"  # it takes about a millisecond
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="laod"):
        dr.laod  # noqa: B018


def test_the_types_are_those_of_the_library():
    tree = ast.parse((ROOT / "dualroute/__init__.pyi").read_text())
    typed = {name.name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert typed == {*dualroute.library.__all__, "UserError"}
    assert {*typed, "__version__"} == set(dr.__all__)


def test_options_mean_what_they_mean_on_the_command_line(tmp_path):
    words = ["--config", "pretrain/quickstart", "--train.max_steps", "7", "--train.max_tokens", "null"]
    words += [
        "--data",
        str(tmp_path),
        "--optim.lr",
        "1e-5",
        "--model.window",
        "64",
        "--optim.grad_clip",
        "null",
    ]
    options = {"train": {"max_steps": 7, "max_tokens": None}, "data": tmp_path, "model.window": 64}
    made = configuration(
        "pretrain", ["pretrain/quickstart", {"optim": {"lr": 1e-5}}], options | {"optim.grad_clip": None}
    )
    asked = parse_stage("pretrain", words)
    assert made == asked
    assert made.given == asked.given
    assert made.model.given == asked.model.given
    whole = PretrainConfig(output="elsewhere")
    assert configuration("pretrain", whole, {}) is whole
    assert configuration("pretrain", None, {}) == PretrainConfig()
    assert configuration("pretrain", {"optim": made.optim}, {}).optim == made.optim


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ("pretrain/quickstar", {}, "no file pretrain/quickstar"),
        (None, {"tran": {}}, "did you mean 'train'"),
        ({"train": {"max_step": 1}}, {}, "did you mean 'train.max_steps'"),
        (None, {"seed": "many"}, "seed: expected an integer, got 'many'"),
        (None, {"train": {"max_steps": 1.5}}, "max_steps: expected an integer"),
        (None, {"model": {"dim": [1]}}, "dim: expected an integer, got a list"),
        (3, {}, "a configuration is a name, a file or a table, not 3"),
        (PretrainConfig(), {"seed": 1}, "PretrainConfig and options (seed) are given"),
        (EvaluateConfig("run"), {}, "pretrain takes a PretrainConfig, not a EvaluateConfig"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(config, options, said):
    with pytest.raises(dr.UserError) as error:
        dr.train(config, **options)
    assert said in str(error.value)


def test_a_run_is_trained_once_and_tells_its_metrics(run, tiny_dataset, capfd):
    assert run.finished
    assert [line["step"] for line in run.metrics() if "val/loss" in line][-1] == 3
    again = dr.train(TINY, output=run.folder, data={"path": tiny_dataset, "context": 64})
    assert again == run
    with (run.folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "cut')
    assert run.metrics()[-1]["step"] == 3
    assert dr.Run(Path("nowhere"), False).metrics() == []


def test_a_model_writes_and_is_measured_as_the_commands_do(model, tiny_dataset):
    text = model.generate("The old", max_new_tokens=12, seed=3)
    assert text == "".join(model.stream("The old", max_new_tokens=12, seed=3))
    both = model.generate_batch(["The old", "A"], max_new_tokens=12, seed=3)
    assert both[0].text == text
    assert len(both[1].tokens) == 12
    score = model.evaluate(data=tiny_dataset, max_tokens=512)
    assert score == evaluate(EvaluateConfig(str(model.folder), data=str(tiny_dataset), max_tokens=512))
    assert f"{model.num_parameters:,} parameters" in repr(model)
    assert model.config.dim == 32
    assert model.metadata["step"] == 3


@pytest.mark.slow
def test_smaller_and_exported_models_load_too(model, tmp_path):
    small = dr.load(dr.quantize(checkpoint=model.folder, output=tmp_path / "int8"))
    assert small.num_parameters == model.num_parameters
    assert small.metadata["quantization"]["scheme"] == "int8_weight_only"
    pytest.importorskip("transformers")
    exported = dr.load(model.export(tmp_path / "hf"))
    assert exported.generate("The old", max_new_tokens=8) == model.generate("The old", max_new_tokens=8)
    with pytest.raises(dr.UserError, match="dualroute convert"):
        exported.export(tmp_path / "again")


def test_a_task_is_learnt_and_answered(model, tmp_path):
    rows = [{"text": f"the {word} bird {k}", "label": word} for k in range(20) for word in ("red", "green")]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    keep = {name: TINY[name] for name in ("optim", "monitor")}
    run = dr.finetune(
        keep,
        init_from=model.folder,
        output=tmp_path / "task",
        data={"path": tmp_path / "rows.csv", "context": 64},
        task={"kind": "sequence", "columns": {"text": "text", "label": "label"}},
        train={"micro_batch": 2, "tokens_per_batch": 128, "max_steps": 2},
    )
    answering = run.load()
    answers = answering.predict([{"text": "the red bird"}, {"text": "the green bird"}])
    assert {answer.prediction["prediction"] for answer in answers} <= {"red", "green"}
    assert answering.evaluate().rows == 7
    with pytest.raises(dr.UserError, match="no column"):
        answering.predict([{"txt": "the red bird"}])
    with pytest.raises(dr.UserError, match="answers a task"):
        answering.generate("the")
    with pytest.raises(dr.UserError, match="trained for no task"):
        model.predict([])


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda model: model.generate("x", temprature=1), "did you mean 'temperature'"),
        (lambda model: model.generate("x", temperature=-1), "sampling.temperature is -1"),
        (lambda model: model.generate("a " * 3000), "the model reads at most"),
        (lambda model: model.generate_batch("one"), "a list of prompts"),
        (lambda model: model.evaluate(), "give --data"),
        (lambda model: model.evaluate(text="x", device="cpu"), "device is no option here"),
        (lambda model: model.evaluate(text="x", tokens=1), "unknown key 'tokens'"),
        (lambda model: model.export("x", "hff"), "did you mean hf"),
        (lambda model: dr.load("nowhere"), "no checkpoint at nowhere"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(model, ask, said):
    with pytest.raises(dr.UserError) as error:
        ask(model)
    assert said in str(error.value)


def test_ctrl_c_stops_with_a_checkpoint_and_the_call_goes_on(tiny_dataset, tmp_path):
    before = {number: signal.getsignal(number) for number in stop_signal.TERMINAL_SIGNALS}
    long = {**TINY, "train": {**TINY["train"], "max_steps": 100_000}}
    place = {"output": tmp_path / "run", "data": {"path": tiny_dataset, "context": 64}}

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not stop_signal._training:
            time.sleep(0.02)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    asking = threading.Thread(target=interrupt)
    asking.start()
    run = dr.train(long, **place)
    asking.join()
    assert not run.finished
    step = run.load().metadata["step"]
    assert 0 < step < 100_000
    assert {number: signal.getsignal(number) for number in before} == before
    assert not stop_signal.received()
    more = {**TINY, "train": {**TINY["train"], "max_steps": step + 1}}
    assert dr.train(more, **place).finished
