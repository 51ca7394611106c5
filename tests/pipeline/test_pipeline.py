"""The pipeline's own work: what is done, skipped, done again and set aside."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml

from dualroute import cli
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import find_checkpoint, save_model
from dualroute.pipeline import run as run_module
from dualroute.pipeline.config import PipelineConfig
from dualroute.pipeline.run import run_pipeline
from dualroute.pipeline.stages import Planner
from tests import warm
from tests.conftest import ROOT


class Stages:
    """Stands in for the commands: notes what was asked for, and writes an output."""

    def __init__(self, tokenizer):
        self.tokenizer, self.done, self.fails, self.salt = tokenizer, [], {}, 0

    def __call__(self, arguments):
        values = dict(word.removeprefix("--").split("=", 1) for word in arguments[1:])
        output = Path(values["output"])
        name = output.stem if output.suffix else output.name
        self.done.append(f"{arguments[0]}-{name}" if output.suffix else name)
        if name in self.fails:
            return self.fails[name]
        if arguments[0] == "evaluate":
            figures = {"loss": 2.0, "perplexity": 7.4, "bits_per_byte": 1.5}
            if "suite" in values:
                figures = self.record("pruned" in output.stem)
            output.write_text(json.dumps(figures))
        elif arguments[0] == "export":
            output.mkdir()
            (output / "export.json").write_text(json.dumps({"format": "hf"}))
        else:
            read = [find_checkpoint(values[key]) for key in ("checkpoint", "init_from") if key in values]
            hashes = [checkpoint.metadata["files"]["model.safetensors"]["sha256"] for checkpoint in read]
            torch.manual_seed(hash((*arguments, *hashes)) + self.salt)
            model = DualRoutingTransformer(ModelConfig(vocab_size=30, dim=16, num_layers=1, num_heads=2))
            save_model(model, output, self.tokenizer, {})
            line = {"step": 1, "event": "validation", "val/loss": 2.0}
            (output / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return 0

    def process(self, child, program):
        """Trainings and measurements, which are processes."""
        start = program.index("-m") + 2
        if program[start - 1] == "dualroute.pipeline.speed":
            path = Path(next(word for word in program if word.startswith("--output=")).partition("=")[2])
            self.done.append(f"speed-{path.stem}")
            figures = {"parameters": 10, "weights_bytes": 100, "eager_tokens_per_second": 5.0,
                       "peak_memory_bytes": 1e6, "samples": {"The": "The | end"}}  # fmt: skip
            path.write_text(json.dumps(figures))
            return 0
        return self(program[start:])

    @staticmethod
    def record(worse):
        """Results of a suite: one score that pruning has lowered, and one within the errors."""
        scores = [("match", 0.5 if worse else 0.9, 0.05), ("f1", 0.61 if worse else 0.6, 0.05)]
        listed = [
            {"metric": m, "value": v, "stderr": e, "n": 9, "higher_is_better": True} for m, v, e in scores
        ]
        bias = {"metric": "male_preferred", "value": 0.7, "stderr": 0.05, "n": 9, "higher_is_better": None}
        listed.append({**bias, "interval": [0.6, 0.8]})
        cell = {"part": "p", "name": "c", "digest": "d", "setting": "s", "scores": listed}
        return {"format": "dualroute-evaluation", "version": 1, "model": {}, "cells": {"p/c": cell}}


@pytest.fixture
def stages(tiny_dataset, monkeypatch):
    fake = Stages(tiny_dataset / "tokenizer.model")
    monkeypatch.setattr(run_module._Child, "run", lambda child, program: fake.process(child, program))
    return fake


@pytest.fixture
def go(tiny_dataset, tmp_path, stages):
    def run(**options):
        stages.done.clear()
        config = PipelineConfig(
            **{
                "output": str(tmp_path / "run"),
                "data": str(tiny_dataset),
                "prepare": None,
                "prune": {"keep": 0.5},
                **options,
            }
        )
        return run_pipeline(config, cli.parse_stage, stages), list(stages.done)

    return run


ALL = [
    "pretrain", "prune", "recover", "quantize",
    "evaluate-parent", "evaluate-pruned", "evaluate-recovered", "evaluate-quantized",
    "speed-parent", "speed-pruned", "speed-recovered", "speed-quantized", "export",
]  # fmt: skip


def test_everything_is_done_once(go, tmp_path):
    assert go() == (0, ALL)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<svg" in page
    assert "The | end" in page
    assert "The \\| end" in (tmp_path / "run" / "report.md").read_text()
    assert go() == (0, [])


def test_a_suite_compares_every_model_with_the_parent(go, tmp_path):
    status, done = go(suite="ruler")
    assert status == 0
    measured = [one for one in done if one.startswith("evaluate-")]
    assert len(measured) == 8  # the loss, and the suite, of four models
    rows = (tmp_path / "run" / "report.md").read_text().split("## Suite: ruler")[1].split("##")[0]
    match, f1, _ = (row for row in rows.splitlines() if row.startswith("| p/c/"))
    assert "0.5000 ± 0.0500 (worse)" in match
    assert match.count("worse") == 1
    assert "worse" not in f1
    assert "better" not in f1
    picture = (tmp_path / "run" / "bias.svg").read_text()  # of what has no better direction, by model
    assert "p/c/male_preferred" in picture
    assert "p/c/match" not in picture
    assert all(label in picture for label in ("parent", "pruned", "recovered", "quantized"))
    assert "Bias along the pipeline" in (tmp_path / "run" / "report.html").read_text()
    assert go(suite="ruler") == (0, [])
    with pytest.raises(UserError, match=r"evaluate\.suite"):
        go(evaluate={"suite": "ruler"})


def test_changed_options_redo_what_depends_on_them_and_lose_nothing(go, tmp_path):
    go()
    status, done = go(recover={"seed": 7})
    assert status == 0
    after = [name for name in ALL if name not in ("pretrain", "prune", "evaluate-parent", "evaluate-pruned",
                                                  "speed-parent", "speed-pruned")]  # fmt: skip
    assert done == after
    assert (tmp_path / "run" / "recover.replaced-1" / "checkpoint.json").is_file()
    assert go(recover={"seed": 7}) == (0, [])


def test_a_changed_file_of_a_file_redoes_and_a_moved_one_does_not(go, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    (files / "optim.yaml").write_text("lr: 0.5\n")
    (files / "recover.yaml").write_text("optim: optim.yaml\n")
    go(recover={"config": str(files / "recover.yaml")})
    files.rename(tmp_path / "moved")
    options = {"recover": {"config": str(tmp_path / "moved" / "recover.yaml")}}
    assert go(**options) == (0, [])
    (tmp_path / "moved" / "optim.yaml").write_text("lr: 0.25\n")
    assert go(**options)[1][0] == "recover"


def test_another_parent_redoes_everything_made_from_it(go, tiny_dataset, tmp_path, stages):
    parent = tmp_path / "parent"
    for salt in (1, 2):
        stages.salt = salt
        stages(["train", f"--output={parent}"])
        _, done = go(parent=str(parent), pretrain=None)
        assert done == ALL[1:]
        parent.rename(tmp_path / f"parent-{salt}")


def test_what_a_stage_began_with_may_be_removed_once_it_can_do_without(go, tiny_dataset, tmp_path, stages):
    parent, teacher = tmp_path / "parent", tmp_path / "teacher"
    for folder in (parent, teacher):
        stages(["train", f"--output={folder}"])
    options = {"parent": str(parent), "pretrain": None, "distill": {"teacher": str(teacher)}}
    stages.fails = {"distill": 75}
    assert go(**options) == (75, ["distill"])
    gone = parent.rename(tmp_path / "gone")
    with pytest.raises(UserError, match="parent is not there"):  # nothing is left of what it would begin with
        go(**options)
    stages.fails = {}
    stages(["train", f"--output={tmp_path / 'run' / 'distill'}"])  # a checkpoint, and no end yet
    stages.fails = {"distill": 75}
    assert go(**options) == (75, ["distill"])
    gone.rename(parent)
    (tmp_path / "run" / "distill").rename(tmp_path / "half")
    stages.fails = {}
    assert go(**options)[0] == 0
    parent.rename(gone)
    assert go(**options) == (0, [])


def test_the_same_weights_made_again_change_nothing_behind_them(go):
    go()
    status, done = go(from_stage="export")
    assert (status, done) == (0, ["export"])


def test_from_a_stage_on_all_is_done_again(go):
    go()
    assert go(from_stage="quantize")[1] == ALL[3:]


def test_a_failure_stops_there_and_goes_on_from_there(go, stages, capsys):
    stages.fails = {"recover": 75}
    status, done = go()
    assert (status, done) == (75, ["pretrain", "prune", "recover"])
    assert "stage recover ended with status 75" in capsys.readouterr().err
    stages.fails = {}
    assert go() == (0, ALL[2:])


def test_an_output_that_was_removed_or_cut_is_made_again(go, tmp_path):
    go()
    (tmp_path / "run" / "quantize" / "model.safetensors").write_bytes(b"short")
    status, done = go()
    assert status == 0
    assert done[0] == "quantize"
    assert "prune" not in done


def test_one_stage_alone(go):
    with pytest.raises(UserError, match="pretrain is not there: the stage that makes it has not been done"):
        go(only="prune")
    assert go(only="pretrain") == (0, ["pretrain"])
    assert go(only="prune") == (0, ["prune"])


def test_rounds_divide_what_is_kept(go, tiny_dataset, tmp_path, stages):
    status, done = go(rounds=2, prune={"keep": 0.49}, quantize=None, export=None)
    assert status == 0
    assert done[:5] == ["pretrain", "prune-1", "recover-1", "prune-2", "recover-2"]
    config = PipelineConfig(
        output=str(tmp_path), data=str(tiny_dataset), prepare=None, rounds=2, prune={"keep": 0.49}
    )
    plan = {stage.name: stage for stage in Planner(config, cli.parse_stage).make().stages}
    assert "--keep=0.7" in plan["prune-1"].arguments
    assert f"--checkpoint={tmp_path / 'recover-1'}" in plan["prune-2"].arguments
    assert f"--teacher={tmp_path / 'pretrain'}" in plan["recover-2"].arguments


def test_controls_differ_from_the_recovery_in_one_thing(tiny_dataset, tmp_path):
    config = PipelineConfig(
        output=str(tmp_path), data=str(tiny_dataset), prepare=None, prune={"keep": 0.5, "axes": ["ffn"]},
        recover={"seed": 3, "distill": {"temperature": 2.0}}, controls=["parent", "cross_entropy", "random"],
    )  # fmt: skip
    plan = {stage.name: stage for stage in Planner(config, cli.parse_stage).make().stages}
    for name in ("recover", "control-parent", "control-cross_entropy", "control-random"):
        assert "--seed=3" in plan[name].arguments
        assert f"--teacher={tmp_path / 'pretrain'}" in plan[name].arguments
    for name in ("control-parent", "control-cross_entropy"):
        assert "--distill.kl_weight=0.0" in plan[name].arguments
    assert f"--init_from={tmp_path / 'pretrain'}" in plan["control-parent"].arguments
    assert f"--init_from={tmp_path / 'prune'}" in plan["control-cross_entropy"].arguments
    pruned = plan["control-random-prune"].arguments
    assert "--criterion=random" in pruned
    assert f"--shape_of={tmp_path / 'prune'}" in pruned
    assert not [word for word in pruned if word.startswith("--keep")]
    assert "--distill.temperature=2.0" in plan["control-random"].arguments


def test_a_signal_reaches_the_stage_and_stops_the_pipeline(go, stages, monkeypatch):
    def stopped(child, program):
        if "pretrain" in program:
            signal.raise_signal(signal.SIGTERM)
            return 75
        return stages.process(child, program)

    monkeypatch.setattr(run_module._Child, "run", stopped)
    assert go() == (75, [])


def test_dry_run_prints_commands_and_does_nothing(go, tmp_path, capsys):
    assert go(dry_run=True) == (0, [])
    printed = capsys.readouterr().out
    assert "# prune: to do\ndualroute prune --keep=0.5" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, "give either data or the section prepare"),
        ({"parent": "x"}, "give either parent or the section pretrain"),
        ({"prune": None}, "prune and recover belong together"),
        ({"rounds": 2, "prune": {}}, "give prune.keep"),
        ({"prune": {"keeep": 0.5}}, "stage prune: unknown key 'keeep'.*did you mean 'keep'"),
        ({"prune": {"keep": 7}}, "stage prune: keep is 7"),
        ({"prune": {"keep": 0.5, "output": "x"}}, "prune.output is filled in by the pipeline"),
        ({"recover": {"config": "no.yaml"}}, "recover.config no.yaml: there is no file"),
        ({"distill": {}}, "distill.teacher is missing"),
        ({"from_stage": "prun"}, "there is no stage prun: the stages are pretrain, prune"),
        ({"from_stage": "prune", "only": "prune"}, "keep one of them"),
    ],
)
def test_mistakes_are_found_before_anything_starts(go, stages, options, message):
    with pytest.raises(UserError, match=message):
        go(**options)
    assert stages.done == []


def test_a_damaged_record_or_measurement_is_named(go, tmp_path):
    go()
    damaged = ["{", "[]", "5", "null", '{"reads": 3}', "{}", "[" * 100_000, "\x00"]
    for place, message in (
        ("stages/prune.json", r"prune\.json is damaged.*remove it"),
        ("evaluate/parent.json", r"parent\.json cannot be read.*remove it"),
        ("speed/pruned.json", r"pruned\.json cannot be read.*remove it"),
    ):
        path = tmp_path / "run" / place
        whole = path.read_bytes()
        for content in damaged:
            path.write_text(content)
            with pytest.raises(UserError, match=message) as refused:
                go(**({} if place.startswith("stages") else {"only": "report"}))
            assert len(str(refused.value).splitlines()) == 1
        path.write_bytes(whole)
    assert go() == (0, [])


@pytest.mark.slow
def test_text_becomes_a_small_model(tiny_dataset, tmp_path, capfd, monkeypatch):
    """The real stages, on a tiny model; trainings are processes of their own, measurements copies of one."""
    real, measured = run_module._Child.run, []

    def run(child, program):
        if program[1:3] != ["-m", "dualroute.pipeline.speed"]:
            return real(child, program)
        measured.append(program)
        done = warm.run(program[3:], cwd=ROOT, env=os.environ, script=ROOT / "dualroute/pipeline/speed.py")
        return done.returncode

    monkeypatch.setattr(run_module._Child, "run", run)
    training = {"train": {"tokens_per_batch": 1024, "micro_batch": 8, "max_steps": 4, "val_every_steps": 4},
                "data": {"context": 128}, "optim": {"lr": 0.01, "warmup_steps": 1}}  # fmt: skip
    model = {
        "dim": 64,
        "num_layers": 1,
        "num_heads": 4,
        "ffn_dim": 192,
        "window": 16,
        "block": 16,
        "top_k": 1,
    }
    config = {
        "output": str(tmp_path / "run"), "prepare": None, "data": str(tiny_dataset),
        "pretrain": {**training, "model": model},
        "prune": {"keep": 0.8, "axes": ["ffn"], "calibration_tokens": 1024, "axis_report": False},
        "recover": training, "export": None, "compile": False, "decode_tokens": 8, "sample_tokens": 8,
        "evaluate": {"max_tokens": 1024},
    }  # fmt: skip
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["pipeline", "--config", str(tmp_path / "pipeline.yaml")]) == 0
    rows = (tmp_path / "run" / "report.md").read_text().splitlines()
    sizes = {row.split("|")[1].strip(): row.split("|")[4].strip() for row in rows if row.count("|") == 12}
    assert float(sizes["quantized"].removesuffix("×")) > 3
    assert len(measured) == 4
    assert cli.main(["pipeline", "--config", str(tmp_path / "pipeline.yaml"), "--from", "export"]) == 2
    capfd.readouterr()
    assert cli.main(["pipeline", "--config", str(tmp_path / "pipeline.yaml")]) == 0
    assert "== quantize: done before" in capfd.readouterr().out
