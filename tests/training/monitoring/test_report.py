"""The report's own parts; tests/test_main_job.py has it whole."""

import pytest

from dualroute.cli import main
from dualroute.errors import UserError
from dualroute.training.monitoring.mixture_record import write_stages
from dualroute.training.monitoring.report import _corpora, _corpus, _data_of
from tests.training.checkpointing.runs import KEPT, pretrain


def test_the_data_are_those_of_the_configuration(tmp_path, tiny_dataset):
    path = tmp_path / "config.yaml"
    path.write_text(f"data:\n  path: {tiny_dataset}\n")
    assert _data_of(path) == {"": str(tiny_dataset)}
    assert dict(_corpora(tmp_path, _data_of(path)))["tokens in it"].endswith("(vocabulary 320)")
    path.write_text("data: {path: /a/b$$c}\n")
    assert _data_of(path) == {"": "/a/b$c"}


def test_every_source_and_every_stage_of_a_mixture_is_told(tmp_path, tiny_dataset):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"data:\n  path: {tiny_dataset}\n"
        f"  sources: [{{path: {tiny_dataset}, name: books}}, {{path: /gone/code}}]\n"
    )
    stages = [
        {"from_sample": 0, "from_tokens": 0, "weights": {"books": 0.75, "code": 0.25}},
        {"from_sample": 100, "from_tokens": 12_800, "weights": {"code": 1.0}},
    ]
    write_stages(tmp_path, stages, None)
    told = dict(_corpora(tmp_path, _data_of(path)))
    assert told["tokens in it, books"].endswith("(vocabulary 320)")
    assert told["corpus, code"] == "the shards are no longer in `/gone/code`"
    assert told["mixture from token 0"] == "books 75.0%, code 25.0%"
    assert told["mixture from token 12,800"] == "code 100.0%"


def test_a_run_that_was_moved_without_its_data_has_a_report(tmp_path):
    assert _corpus(tmp_path / "gone") == [("corpus", f"the shards are no longer in `{tmp_path / 'gone'}`")]


@pytest.mark.parametrize(
    "content",
    ["", "[", "data: 5", "data: {path: 5}", "data: {}", "data: {sources: [5]}", "a: \x00", "[" * 5000],
)
def test_a_damaged_configuration_is_named(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml is damaged") as refused:
        _data_of(path)
    assert str(refused.value).isprintable()


def test_a_damaged_checkpoint_is_named_and_the_rest_is_reported(tmp_path, tiny_dataset, capsys):
    run = tmp_path / "run"
    assert pretrain(tiny_dataset, run, 8, *KEPT) == 0
    first, second = (run / "checkpoints" / f"step-{step:08d}" for step in (4, 8))

    def reported():
        assert main(["report", "--run", str(run), "--sample_tokens", "2"]) == 0
        return (run / "report.md").read_text()

    assert "| damaged checkpoint |" not in reported()
    (second / "checkpoint.json").write_text("{")
    text = reported()
    assert f"| damaged checkpoint | {second}/checkpoint.json is damaged" in text
    assert f"| newest checkpoint | `{first}` |" in text
    assert "| trained | 4 steps" in text
    weights = first / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    text = reported()
    assert text.count("| damaged checkpoint | ") == 2
    assert "none that can be read" in text
    assert "| validation loss | " in text
    capsys.readouterr()
