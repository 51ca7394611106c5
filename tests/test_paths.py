"""Paths of configurations: what is written down is whole, and is read again as the same."""

import os

from dualroute.cli import parse_stage
from dualroute.paths import absolute_paths
from dualroute.training.trainer import resolved_yaml


def test_the_configuration_of_a_run_means_the_same_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    words = ["--output", "runs/a$b", "--data", "../shards", "--init_from=runs/base", "--resume", "never"]
    config = parse_stage("pretrain", words)
    written = resolved_yaml(config)
    (tmp_path / "elsewhere" / "config.yaml").write_text(written)
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = parse_stage("pretrain", ["--config", "config.yaml"])
    assert again.output == str(tmp_path / "work" / "runs" / "a$b")
    assert again.data.path == str(tmp_path / "shards")
    assert again.init_from == str(tmp_path / "work" / "runs" / "base")
    assert again.resume == "never"
    assert resolved_yaml(again) == written


def test_words_and_what_is_null_stay():
    config = parse_stage("pretrain", ["--resume", "auto"])
    whole = absolute_paths(config)
    assert (whole.resume, whole.init_from) == ("auto", None)
    assert whole.output == os.path.abspath(config.output)
    assert config.output == "runs/pretrain"
