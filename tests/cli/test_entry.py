"""The command line: merging, help, and one line for everything that a person can mend."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from dualroute.cli import STAGES, main, parse_stage
from dualroute.cli.help import stage_parser
from dualroute.data.manifest import Manifest
from dualroute.pipeline.stages import Planner
from dualroute.training.config import PretrainConfig
from tests.conftest import ROOT, write_corpus

TINY = ["--model.dim", "32", "--model.num_layers", "1", "--model.num_heads", "2", "--model.block", "16"]
BATCH = ["--data.context", "64", "--train.micro_batch", "2", "--train.tokens_per_batch", "256"]
SHORT = [*TINY, *BATCH, "--train.max_steps", "8", "--optim.warmup_steps", "2", "--monitor.peak_tflops", "0.1"]


def refused(capsys, *arguments):
    """Run a command that must be refused; its single line of error."""
    assert main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def copied(tiny_dataset, tmp_path):
    """The tiny data set, to be damaged."""
    return shutil.copytree(tiny_dataset, tmp_path / "shards")


@pytest.fixture
def pretrain(tmp_path, capsys):
    """Refused `dualroute pretrain` on a data set: the line of error; no checkpoint was begun."""

    def run(dataset, *more):
        output = tmp_path / "run"
        line = refused(capsys, "pretrain", *SHORT, "--data.path", dataset, "--output", output, *more)
        assert not (output / "checkpoints").exists()
        return line

    return run


def test_usage_lists_every_stage(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for stage in STAGES:
        assert stage in shown
    assert "did you mean 'pretrain'" in refused(capsys, "pretrian")


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_is_explained(stage):
    parser = stage_parser(stage)
    unexplained = [a.dest for a in parser._actions if not a.help]
    assert not unexplained


def test_flags_win_over_files_and_files_over_defaults(tmp_path):
    (tmp_path / "model.yaml").write_text("dim: 64\nnum_heads: 4\n")
    (tmp_path / "run.yaml").write_text("model: model.yaml\noptim:\n  lr: 0.5\n  weight_decay: 0.3\n")
    arguments = ["--config", str(tmp_path / "run.yaml"), "--optim.lr", "0.25", "--model.num_layers", "7"]
    config = parse_stage("pretrain", arguments)
    assert isinstance(config, PretrainConfig)
    assert (config.model.dim, config.model.num_heads, config.model.num_layers) == (64, 4, 7)
    assert (config.optim.lr, config.optim.weight_decay) == (0.25, 0.3)
    assert config.data.context == PretrainConfig().data.context


@pytest.mark.parametrize("path", sorted((ROOT / "configs/pretrain").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_pretraining_configurations_are_valid(path):
    config = parse_stage("pretrain", ["--config", str(path)])
    assert config.data.context <= config.model.max_context
    assert config.train.total_steps > config.optim.warmup_steps


@pytest.mark.parametrize("path", sorted((ROOT / "configs/distill").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_distillations_are_valid(path):
    config = parse_stage("distill", ["--config", str(path)])
    assert config.teacher
    assert config.train.total_steps > config.optim.warmup_steps


@pytest.mark.parametrize("path", sorted((ROOT / "configs/prepare").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_preparations_are_valid(path):
    parse_stage("prepare", ["--config", str(path)]).check()


@pytest.mark.parametrize("path", sorted((ROOT / "configs/deepspeed").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_parallel_settings_are_valid(path):
    config = parse_stage("pretrain", ["--parallel", str(path)]).parallel
    assert config.zero_stage in (0, 1, 2, 3)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/pipeline").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_pipelines_are_valid_to_their_last_stage(path):
    plan = Planner(parse_stage("pipeline", ["--config", str(path)]), parse_stage).make()
    assert plan.names()[-1] == "export"


def test_an_unknown_key_names_the_nearest_and_the_file(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  dimm: 64\n")
    line = refused(capsys, "pretrain", "--config", path)
    assert "'model.dimm'" in line
    assert str(path) in line
    assert "did you mean 'model.dim'" in line
    (tmp_path / "model.yaml").write_text("dim: 64\nnum_head: 4\n")
    path.write_text("model: model.yaml\n")
    line = refused(capsys, "pretrain", "--config", path)
    assert f"'model.num_head' in {tmp_path / 'model.yaml'}:2; did you mean 'model.num_heads'" in line
    path.write_text("model:\n  dim: wide\n")
    assert f"model.dim in {path}:2: expected an integer, got 'wide'" in refused(
        capsys, "pretrain", "--config", path
    )
    assert "did you mean 'optim.lr'" in refused(capsys, "pretrain", "--optim.lrr", "1")
    assert "did you mean 'train.max_steps'" in refused(capsys, "pretrain", "--max_steps", "1")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model.dim", "wide"], ["model.dim", "wide", "int"]),
        (["--train.precision", "bf17"], ["train.precision", "bf17", "bf16-mixed"]),
        (["--model.num_heads", "7"], ["num_heads=7", "model.dim=256"]),
        (["--optim.lr", "-1"], ["optim.lr"]),
        (["--train.max_steps", "5", "--train.max_tokens", "5"], ["train.max_steps", "train.max_tokens"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--monitor.log_every_steps", "0"], ["monitor.log_every_steps"]),
    ],
)
def test_wrong_values_are_named(arguments, named, capsys):
    line = refused(capsys, "pretrain", *arguments)
    for word in named:
        assert word in line


def test_a_broken_yaml_names_the_file(tmp_path, capsys):
    path = tmp_path / "broken.yaml"
    path.write_text("model: {dim: 64\n")
    assert "broken.yaml" in refused(capsys, "pretrain", "--config", path)


def test_contradictions_are_explained_before_anything_starts(tiny_dataset, pretrain):
    line = pretrain(tiny_dataset, "--train.tokens_per_batch", "300")
    assert "300" in line
    assert "256" in line  # the nearest valid one
    line = pretrain(tiny_dataset, "--model.max_context", "32")
    assert "data.context 64" in line
    assert "model.max_context 32" in line
    line = pretrain(tiny_dataset, "--model.vocab_size", "999")
    assert "999" in line
    assert "320" in line
    if not torch.cuda.is_available():
        assert "16-mixed needs a CUDA device" in pretrain(tiny_dataset, "--train.precision", "16-mixed")
    assert "optim.warmup_steps 8" in pretrain(tiny_dataset, "--optim.warmup_steps", "8")


def test_context_longer_than_the_data(tiny_dataset, pretrain):
    tokens = Manifest.load(tiny_dataset).split("train").tokens
    context = 2 * tokens
    long = [
        "--data.context",
        context,
        "--model.max_context",
        context,
        "--train.tokens_per_batch",
        2 * context,
    ]
    assert f"{tokens}" in pretrain(tiny_dataset, *long)


def test_data_that_are_not_there(tmp_path, pretrain):
    assert str(tmp_path / "nothing") in pretrain(tmp_path / "nothing")


@pytest.mark.parametrize("damage", ["missing", "truncated", "corrupt"])
def test_a_damaged_shard_is_named(copied, pretrain, damage):
    shard = copied / "train-00000.tar"
    data = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(data[:-1000])
    else:
        data[len(data) // 2] ^= 255
        shard.write_bytes(data)
    assert "train-00000.tar" in pretrain(copied)


def test_another_tokenizer_beside_the_shards(copied, pretrain):
    with (copied / "tokenizer.model").open("ab") as stream:
        stream.write(b"\x00")
    assert "tokenizer.model" in pretrain(copied)


def test_no_validation_documents(copied, pretrain):
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["splits"]["val"]
    path.write_text(json.dumps(manifest))
    line = pretrain(copied)
    assert "val" in line


def test_an_output_folder_that_cannot_be_written(tiny_dataset, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    output = tmp_path / "file" / "run"
    line = refused(capsys, "pretrain", *SHORT, "--data.path", tiny_dataset, "--output", output)
    assert str(output) in line
    assert "--output" in line


def test_several_ranks_without_deepspeed(tiny_dataset, pretrain, monkeypatch):
    import dualroute.training.parallel.strategy as strategy

    monkeypatch.setattr(strategy, "find_spec", lambda name: None)
    line = pretrain(tiny_dataset, "--parallel.strategy", "deepspeed")
    assert "pip install -e '.[deepspeed]'" in line


@pytest.mark.parametrize(
    ("key", "value"), [("sequence_parallel_size", 2), ("zero_optimization", {"stage": 3})]
)
def test_deepspeed_settings_that_contradict_are_refused(tiny_dataset, pretrain, tmp_path, key, value):
    pytest.importorskip("deepspeed")
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({key: value}))
    flags = ["--parallel.strategy", "deepspeed", "--parallel.zero_stage", "1"]
    line = pretrain(tiny_dataset, *flags, "--parallel.deepspeed_config", path)
    assert key in line
    assert "ds.json" in line


def test_bad_corpora_are_refused_and_leave_nothing(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    output = tmp_path / "shards"
    assert "empty" in refused(capsys, "prepare", "--corpus", tmp_path / "empty", "--output", output)
    write_corpus(tmp_path / "corpus", 4)
    (tmp_path / "corpus" / "text-002.txt").write_bytes(b"good \xff\xfe bad")
    line = refused(capsys, "prepare", "--corpus", tmp_path / "corpus", "--output", output)
    assert "text-002.txt" in line
    assert "byte" in line
    (tmp_path / "corpus" / "text-002.txt").unlink()
    many = ["--vocab_size", "50000", "--val_fraction", "0.5", "--progress", "false"]
    line = refused(capsys, "prepare", "--corpus", tmp_path / "corpus", "--output", output, *many)
    assert "50000" in line.replace(",", "")
    assert "did you mean" in refused(capsys, "prepare", "--corpus", "wikitext-13", "--output", output)
    assert not output.exists()


@pytest.mark.slow
def test_print_config_shows_yaml_that_is_read_again(tmp_path):
    shown = subprocess.run(
        [sys.executable, "-m", "dualroute.cli", "pretrain", "--model.dim", "96", "--print_config"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True,
    ).stdout  # fmt: skip
    assert yaml.safe_load(shown)["model"]["dim"] == 96
    (tmp_path / "again.yaml").write_text(shown)
    assert parse_stage("pretrain", ["--config", str(tmp_path / "again.yaml")]).model.dim == 96


def test_a_pipe_that_breaks_elsewhere_is_a_defect(monkeypatch):
    def broken(arguments):
        raise BrokenPipeError("a socket")

    monkeypatch.setattr("dualroute.cli.entry.run", broken)
    with pytest.raises(BrokenPipeError):
        main(["configs"])


@pytest.mark.parametrize("flag", [["--interactive"], ["--interactive", "true"], ["--interactive=true"]])
def test_generate_interactive_is_chat(flag, tmp_path, capsys):
    assert main(["generate", "--checkpoint", str(tmp_path / "none"), *flag]) == 2
    said = capsys.readouterr().err
    assert "note: generate --interactive is dualroute chat" in said
    assert "none" in said
