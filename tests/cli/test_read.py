"""Files and flags put together: whose value counts, what a mistake is called, and what was given."""

import os

import pytest
import yaml

from dualroute.cli import main, parse_stage
from dualroute.errors import UserError, one_line, printable


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Write a YAML file into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="run.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return name

    return write


def refusal(stage, *arguments):
    with pytest.raises(UserError) as refused:
        parse_stage(stage, [str(word) for word in arguments])
    line = one_line(str(refused.value))
    assert line == str(refused.value)
    return line


def test_flags_of_a_section_are_laid_over_it_one_by_one(file):
    name = file("prune: {keep: 0.5, axes: [ffn]}\nrecover: {train: {max_steps: 5}, optim: {lr: 0.1}}\n")
    flags = [
        "--prune.multiple",
        "32",
        "--prune.batch_size=2",
        "--recover.train.micro_batch",
        "4",
        "--export.opset=21",
    ]
    config = parse_stage("pipeline", ["--config", name, *flags])
    assert config.prune == {"keep": 0.5, "axes": ["ffn"], "multiple": 32, "batch_size": 2}
    assert config.recover == {"train": {"max_steps": 5, "micro_batch": 4}, "optim": {"lr": 0.1}}
    assert config.export == {"format": "hf", "opset": 21}  # what the section begins with stays
    config = parse_stage("pipeline", ["--config", name, "--prune", "null", "--recover", "null"])
    assert (config.prune, config.recover) == (None, None)
    assert parse_stage("pipeline", ["--export", "null", "--export.format", "onnx"]).export["format"] == "onnx"


def test_sections_are_typed_and_checked_where_they_stand(file):
    name = file("prune:\n  keep: half\n")
    assert f"prune.keep in {name}:2: expected a number or null, got 'half'" in refusal(
        "pipeline", "--config", name
    )
    name = file("recover:\n  train:\n    max_step: 5\n")
    line = refusal("pipeline", "--config", name)
    assert (
        f"unknown key 'recover.train.max_step' in {name}:3; did you mean 'recover.train.max_steps'?" in line
    )
    assert "--quantize.scheme: expected one of int8_weight_only" in refusal(
        "pipeline", "--quantize.scheme", "int3"
    )


def test_files_of_a_section_start_where_they_are_named(file, tmp_path):
    name = file("recover:\n  config: ../distill/a.yaml\n", "configs/pipeline/p.yaml")
    assert parse_stage("pipeline", ["--config", name]).recover == {"config": "configs/distill/a.yaml"}
    assert parse_stage("pipeline", ["--recover.config", "[a.yaml, b.yaml]"]).recover["config"] == [
        "a.yaml",
        "b.yaml",
    ]


def test_later_files_and_flags_win_key_by_key(file):
    first = file("optim: {lr: 0.5, eps: 1.0e-6}\ntrain: {max_steps: 9}\n", "a.yaml")
    second = file("optim: {lr: 0.25}\n", "b.yaml")
    flags = ["--optim.warmup-steps=3"]
    config = parse_stage("pretrain", [*flags, "--config", first, f"--config={second}"])
    assert (config.optim.lr, config.optim.eps, config.optim.warmup_steps, config.train.max_steps) == (
        0.25,
        1e-6,
        3,
        9,
    )
    assert {key for key in config.given if "." in key} == {
        "optim.lr", "optim.eps", "optim.warmup_steps", "train.max_steps",
    }  # fmt: skip
    assert config.optim.given == {"lr", "eps", "warmup_steps"}


def test_numbers_words_and_paths_as_people_write_them(file, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch")
    name = file(
        "output: ~/runs\ndata: {path: $SCRATCH/books}\noptim:\n"
        "train: {precision: 32, max_tokens: 1e9, tokens_per_batch: 10k}\nseed: 1_0\n"
    )
    config = parse_stage("pretrain", ["--config", name])
    assert (config.train.precision, config.train.max_tokens) == ("32", 10**9)
    assert (config.train.tokens_per_batch, config.seed) == (10_000, 10)
    assert config.data.path == "/scratch/books"
    assert config.output == os.path.expanduser("~/runs")


def test_an_empty_section_is_its_defaults_and_a_scalar_is_none(file):
    assert parse_stage("pretrain", ["--config", file("optim:\n")]).optim.lr == 3e-4
    line = refusal("pretrain", "--config", file("train: 5\n"))
    assert "train in run.yaml:1: expected its options (train.tokens_per_batch" in line
    assert "got '5'" in line
    assert "expected its options" in refusal("pretrain", "--config", file("train: [1]\n"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--optim.lr", "fast"], "--optim.lr: expected a number, got 'fast'"),
        (["--outp", "x"], "unknown key 'outp'; did you mean 'output'?"),
        (["--train.max_step", "1"], "unknown key 'train.max_step'; did you mean 'train.max_steps'?"),
        (["--output", ""], "--output: a path may not be empty"),
        (["--output"], "--output needs a value"),
        (["--config"], "--config needs a file"),
        (["--config", ""], "--config needs a file, it is empty"),
        (["output=x"], "'output=x' is no option: options are written --key value"),
        (["--config", "a.yaml", "b.yaml"], "'b.yaml' is no option: options are written --key value"),
        (["--config", "configs/pretrain/quickstart.yaml"], "the shipped one is --config pretrain/quickstart"),
        (["--config", "pretrain/quickstrat"], "`dualroute configs` lists no such configuration"),
    ],
)
def test_a_mistake_in_a_flag_is_blamed_on_the_flag(file, arguments, line):
    name = file("optim: {lr: 0.1}\noutput: runs/a\n")
    file("", "a.yaml")
    assert line in refusal("pretrain", "--config", name, *arguments)
    assert name not in line


def test_what_is_out_of_range_names_its_line(file):
    name = file("optim:\n  lr: -1\n")
    assert f"({name}:2)" in refusal("pretrain", "--config", name)
    assert name not in refusal("pretrain", "--config", name, "--optim.lr", "-2")


def test_renamed_and_other_spellings_count_and_one_line_says_so(file, capsys):
    name = file("train:\n  checkpoint_every_layers: 3\n")
    assert parse_stage("pretrain", ["--config", name]).train.recompute_every_layers == 3
    note = "train.checkpoint_every_layers (run.yaml:2) is called train.recompute_every_layers here"
    assert capsys.readouterr().err.splitlines() == [f"dualroute: note: {note}"]
    config = parse_stage("pipeline", ["--recover.train.checkpoint-every-layers", "2"])
    assert config.recover == {"train": {"recompute_every_layers": 2}}
    assert "is called recover.train.recompute_every_layers here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "needed"),
    [("evaluate", ["--checkpoint=c"]), ("prune", ["--checkpoint=c", "--output=o", "--keep=0.5"]),
     ("convert", ["--source=s", "--output=o"]), ("export", ["--checkpoint=c", "--output=o", "--format=hf"])],
)  # fmt: skip
def test_a_folder_of_shards_is_data_in_every_command(stage, needed, file, capsys):
    assert parse_stage(stage, [*needed, "--data", "d"]).data == "d"
    assert parse_stage(stage, [*needed, "--data.path", "d"]).data == "d"
    assert "data.path (--data.path) is called data here" in capsys.readouterr().err
    assert parse_stage(stage, [*needed, "--config", file("data: {path: d}\n")]).data == "d"


@pytest.mark.parametrize("stage", ["pretrain", "distill", "cache-logits", "estimate"])
def test_data_of_a_training_may_be_its_folder(stage, file, tmp_path, capsys):
    assert parse_stage(stage, ["--data", "d", "--data.context", "64"]).data.path == "d"
    assert parse_stage(stage, ["--data", str(tmp_path)]).data.path == str(tmp_path)  # one that is there
    assert parse_stage(stage, ["--config", file("data: d\n")]).data.path == "d"
    assert not capsys.readouterr().err


def test_switches_and_print_config(file, capsys):
    assert parse_stage("doctor", ["--no-smoke"]).smoke is False
    assert parse_stage("doctor", ["--smoke", "--disk-mib=3"]).smoke is True
    assert parse_stage("pipeline", ["--dry-run", "--from", "prune"]).dry_run is True
    name = file("prune: {keep: 0.5}\noutput: 'a$$b'\n")
    assert main(["pipeline", "--config", name, "--print_config", "--prompts", "[a, 'null']"]) == 0
    shown = file(capsys.readouterr().out, "shown.yaml")
    config = parse_stage("pipeline", ["--config", shown])
    assert (config.prune, config.output, config.prompts) == ({"keep": 0.5}, "a$b", ["a", "null"])
    assert main(["prune", "--print-config"]) == 0  # what must be given is null
    assert yaml.safe_load(capsys.readouterr().out)["checkpoint"] is None
    assert "checkpoint and output must be given: --checkpoint …" in refusal("prune")


def test_configurations_that_come_with_it_are_found_by_name_from_anywhere(file, capsys):
    file("")
    config = parse_stage("pretrain", ["--config", "pretrain/quickstart"])
    assert (config.output, config.data.path, config.model.dim) == ("runs/quickstart", "data/stdlib", 192)
    assert parse_stage("pretrain", ["--model", "model/5m"]).model.num_layers == 6
    assert main(["configs"]) == 0
    assert "  pretrain/quickstart      What launch/quickstart.sh trains" in capsys.readouterr().out
    assert main(["configs", "show", "pretrain/quickstart"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["output"] == "runs/quickstart"
    assert main(["configs", "show", "pretrain/quickstat"]) == 2
    assert "did you mean pretrain/quickstart?" in capsys.readouterr().err


def test_a_message_is_one_line_and_obeys_nobody(file, capsys):
    assert main(["pretrain", "--config", "a\x1b[2J\nb\u202e.yaml"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.rstrip("\n").isprintable()
    assert "a\\x1b[2J" in line
    assert main(["pre\x1btrain"]) == 2
    assert "\x1b" not in capsys.readouterr().err
    assert printable("a\udcff\x07\u2028") == "a\\udcff\\x07\\u2028"


def test_nothing_of_a_message_is_lost():
    assert one_line("two things:\n  first\n\n  second,\nthird") == "two things: first; second, third"
    wrapped = (
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x"\n'
        "dualroute.errors.UserError: train-00000.tar is damaged:\nprepare it again\n"
    )
    assert one_line(wrapped) == "train-00000.tar is damaged: prepare it again"
