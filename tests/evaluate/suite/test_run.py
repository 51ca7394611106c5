"""A suite from its file to its results: measured once, kept, gone on with, compared."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dualroute.cli import parse_stage, run_or_explain
from dualroute.errors import UserError
from dualroute.evaluate.config import EvaluateConfig
from dualroute.evaluate.load import load
from dualroute.evaluate.perplexity import evaluate
from dualroute.evaluate.suite import run as suite_run
from dualroute.evaluate.suite.cells import Score, mean_score, paired_error, ratio
from dualroute.evaluate.suite.compare import differences
from dualroute.evaluate.suite.model import SuiteModel
from dualroute.model.checkpoint import format as checkpoint_format
from dualroute.tasks.suite import suite_command

TEXT = "The old bird sees the river.\nA stone sleeps under the hill.\n" * 40
SUITE = """
parts:
  - part: perplexity
    text: [./one.txt, ./two.txt]
    context: 48
    stride: 16
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "one.txt").write_text(TEXT)
    (tmp_path / "two.txt").write_text(TEXT[7:-90])
    (tmp_path / "suite.yaml").write_text(SUITE)
    return tmp_path


def measured(checkpoint, files, **more):
    output = files / more.pop("output", "result.json")
    suite_command(
        EvaluateConfig(
            str(checkpoint), suite=str(files / "suite.yaml"), output=str(output), batch_size=3, **more
        )
    )
    return json.loads(output.read_text())


def scores(cell):
    return {score["metric"]: score for score in cell["scores"]}


def test_perplexity_is_that_of_the_command_with_an_error(checkpoint, files, capsys):
    result = measured(checkpoint, files)
    assert list(result["cells"]) == ["perplexity/one.txt", "perplexity/two.txt"]
    cell = result["cells"]["perplexity/one.txt"]
    plain = evaluate(EvaluateConfig(str(checkpoint), text=str(files / "one.txt"), context=48, stride=16))
    found = scores(cell)
    assert found["loss"]["value"] == pytest.approx(plain.loss, rel=1e-5)
    assert found["bits_per_byte"]["value"] == pytest.approx(plain.bits_per_byte, rel=1e-5)
    words = len(TEXT.split())
    assert found["word_perplexity"]["value"] == pytest.approx(
        math.exp(plain.loss * plain.targets / words), rel=1e-4
    )
    assert 0 < found["loss"]["stderr"] < found["loss"]["value"]
    places = cell["details"]["by_position"]
    assert sum(one["targets"] for one in places) == plain.targets
    total = sum(one["loss"] * one["targets"] for one in places)
    assert total / plain.targets == pytest.approx(plain.loss, rel=1e-4)
    assert [one["from"] for one in places] == [1, 2, 4, 8, 16, 32]
    assert "bits per byte" in capsys.readouterr().out


def test_what_was_measured_is_kept_until_something_changes(checkpoint, files, monkeypatch):
    first = measured(checkpoint, files)
    calls = []
    likelihoods = SuiteModel.likelihoods
    monkeypatch.setattr(
        SuiteModel, "likelihoods", lambda self, pairs: calls.append(1) or likelihoods(self, pairs)
    )
    assert measured(checkpoint, files) == first
    assert calls == []
    (files / "two.txt").write_text(TEXT)
    again = measured(checkpoint, files)
    assert len(calls) == 1
    assert again["cells"]["perplexity/one.txt"] == first["cells"]["perplexity/one.txt"]
    assert again["cells"]["perplexity/two.txt"]["digest"] != first["cells"]["perplexity/two.txt"]["digest"]


def test_an_interrupted_evaluation_goes_on(checkpoint, files, monkeypatch):
    likelihoods, calls = SuiteModel.likelihoods, []

    def dying(self, pairs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return likelihoods(self, pairs)

    monkeypatch.setattr(SuiteModel, "likelihoods", dying)
    with pytest.raises(KeyboardInterrupt):
        measured(checkpoint, files)
    kept = json.loads((files / "result.json").read_text())
    assert list(kept["cells"]) == ["perplexity/one.txt"]
    whole = measured(checkpoint, files)
    assert len(calls) == 3  # the first text was not read again
    assert list(whole["cells"]) == ["perplexity/one.txt", "perplexity/two.txt"]


def test_a_model_of_nan_is_named_and_not_scored(checkpoint, files):
    broken = shutil.copytree(checkpoint, files / "broken")
    folder = broken / "checkpoints" / "step-00000001"
    weights = load_file(folder / checkpoint_format.WEIGHTS)
    weights["norm.weight"][:] = math.nan
    save_file(weights, folder / checkpoint_format.WEIGHTS)
    metadata = json.loads((folder / checkpoint_format.METADATA).read_text())
    metadata["files"] = checkpoint_format.describe_files(folder)
    (folder / checkpoint_format.METADATA).write_text(json.dumps(metadata))
    with pytest.raises(UserError, match=r"broken.*no finite numbers.*nothing was scored"):
        measured(broken, files)
    assert not (files / "result.json").exists()
    model = SuiteModel(load(broken))
    with pytest.raises(UserError, match=r"broken.*no finite numbers"):
        model.write([[1, 5, 7]], 4)


def test_a_difference_within_two_errors_is_none():
    def record(value, error, **more):
        said = {"tokenizer": "a", **more}
        cell = {"setting": "s", "digest": "d", "scores": [Score("m", value, error, 9).to_json()]}
        return {"model": said, "cells": {"p/c": cell}}

    def verdict(one, other):
        return next(differences(one, other)).verdict

    assert verdict(record(0.5, 0.1), record(0.3, 0.1)) == "no difference"
    assert verdict(record(0.5, 0.05), record(0.3, 0.05)) == "better"
    assert verdict(record(0.3, 0.05), record(0.5, 0.05)) == "worse"
    assert verdict(record(0.3, None), record(0.5, 0.05)) == "not compared: no standard error"
    other = record(0.5, 0.01)
    other["cells"]["p/c"]["setting"] = "other"
    assert verdict(record(0.3, 0.01), other) == "not compared: other data or settings"
    for one in (tokens := [record(2.0, 0.01), record(1.0, 0.01, tokenizer="b")]):
        one["cells"]["p/c"]["scores"][0]["unit"] = "token"
    assert "tokenizers differ" in verdict(*tokens)


def test_the_same_samples_are_compared_one_by_one():
    """Two models that agree on what is hard: a small difference everywhere is one."""
    hard = [float(k % 9) for k in range(60)]
    one, other = (
        mean_score("m", hard),
        mean_score("m", [value + 0.1 + 0.01 * (k % 2) for k, value in enumerate(hard)]),
    )
    assert abs(one.value - other.value) < one.stderr
    spread = [0.1 + 0.01 * (k % 2) for k in range(60)]
    assert paired_error(one, other) == pytest.approx(mean_score("d", spread).stderr)
    record = {"model": {"tokenizer": "a"}, "cells": {"p/c": {"setting": "s", "digest": "d"}}}
    records = [json.loads(json.dumps(record)) for _ in range(2)]
    for said, score in zip(records, (other, one), strict=True):
        said["cells"]["p/c"]["scores"] = [score.to_json()]
    assert next(differences(*records)).verdict == "better"
    records[0]["cells"]["p/c"]["setting"] = "another"
    assert next(differences(*records)).verdict.startswith("not compared")


def test_the_command_compares_with_another_result(checkpoint, files, capsys):
    measured(checkpoint, files)
    measured(checkpoint, files, output="other.json", compare=str(files / "result.json"))
    out = capsys.readouterr().out
    assert "no difference" in out
    assert "better" not in out
    (files / "no.json").write_text("{}")
    with pytest.raises(UserError, match=r"no\.json holds no results of a suite"):
        measured(checkpoint, files, compare=str(files / "no.json"))


def test_errors_are_those_of_the_textbook():
    score = mean_score("m", [0.0, 1.0, 1.0, 1.0])
    assert (score.value, score.stderr) == (0.75, pytest.approx(0.25))
    sure = mean_score("m", [1.0] * 4)
    assert sure.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 8))
    value, error = ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (value, error) == (2.0, pytest.approx(0.0))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator).tolist()
    _, error = ratio(values, [1.0] * 400)
    assert error == pytest.approx(float(torch.tensor(values).std()) / 20, rel=1e-3)


@torch.no_grad()
def test_likelihoods_are_those_of_the_whole_text_however_they_are_grouped(checkpoint):
    """Alone, in a batch of other lengths, and after a context that is read once for several."""
    loaded = load(checkpoint)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, loaded.model.config.vocab_size, (120,), generator=draw).tolist()
    context = ids[:50]
    pairs = [(context, ids[60:61]), (context, ids[70:76]), (context, ids[80:83]), (ids[:9], ids[9:30])]
    kept = []
    model = SuiteModel(loaded, batch_size=3)
    after = model._after_prefix
    model._after_prefix = lambda rows: kept.append(len(rows)) or after(rows)
    found = model.likelihoods(pairs)
    assert kept == [3]
    for (before, asked), one in zip(pairs, found, strict=True):
        logits = loaded.model(torch.tensor([before + asked[:-1]]))[0, len(before) - 1 :]
        wanted = -F.cross_entropy(logits, torch.tensor(asked), reduction="none")
        assert one.tokens == pytest.approx(wanted.numpy(), abs=1e-4)
        assert one.greedy == bool((logits.argmax(-1) == torch.tensor(asked)).all())


def test_texts_end_before_a_stop_string(checkpoint):
    model = SuiteModel(load(checkpoint))
    prompt = model.encode("The old bird")
    whole = model.write([prompt], 24)[0]
    stop = whole[len(whole) // 2 :][:2]
    assert model.write([prompt, prompt], 24, [stop]) == [whole.split(stop)[0]] * 2


def test_a_suite_that_does_not_fit_is_refused_before_the_work(checkpoint, files, monkeypatch):
    monkeypatch.setattr(SuiteModel, "likelihoods", lambda *_: pytest.fail("it was measured"))

    def refused(suite, **more):
        (files / "suite.yaml").write_text(suite)
        with pytest.raises(UserError) as caught:
            measured(checkpoint, files, **more)
        return str(caught.value)

    assert "max_context 128" in refused("parts: [{part: perplexity, text: [./one.txt], context: 999}]")
    assert "names no text" in refused("parts: [{part: perplexity}]")
    assert "nowhere.txt" in refused("parts: [{part: perplexity, text: [./one.txt, ./nowhere.txt]}]")
    assert "context of 128 tokens" in refused("parts: [{part: ruler, lengths: [4096]}]")
    assert "too few for this task" in refused("parts: [{part: ruler, tasks: [vt]}]")
    assert "was not trained for a task" in refused("parts: [{part: task}]")
    assert "did you mean crows_pairs" in refused("parts: [{part: fairness, sets: [crows_pair]}]")
    assert "there is no folder" in refused("parts: [{part: ruler}]", output="no/where.json")


def test_shards_are_measured_too(checkpoint, files, tiny_dataset):
    (files / "suite.yaml").write_text(f"parts: [{{part: perplexity, data: {tiny_dataset}, context: 64}}]")
    cell = measured(checkpoint, files)["cells"]["perplexity/shards:val"]
    plain = evaluate(EvaluateConfig(str(checkpoint), data=str(tiny_dataset), context=64))
    # windows end with their document here, and with the slot there: the past of some targets differs
    assert scores(cell)["loss"]["value"] == pytest.approx(plain.loss, rel=0.02)
    assert cell["details"]["targets"] == plain.targets


def test_the_command_line_says_it_in_one_line(checkpoint, files, capsys):
    assert run_or_explain(["evaluate", "--checkpoint", str(checkpoint), "--suite", "perplexty"]) == 2
    assert "did you mean perplexity" in capsys.readouterr().err


def test_what_evaluate_wrote_before_is_as_it_was(checkpoint, files):
    config = parse_stage("evaluate", ["--checkpoint", str(checkpoint), "--text", str(files / "one.txt")])
    assert set(config.of_one_measure()) == {
        "checkpoint", "data", "text", "split", "context", "stride", "max_tokens", "batch_size", "device",
        "dtype", "scale", "output", "cache_dtype", "sources",
    }  # fmt: skip


def test_every_part_can_be_built():
    import importlib

    for module in suite_run._PARTS.values():
        if "harness" not in module:
            assert callable(importlib.import_module(module).cells)


def test_a_damaged_result_is_named(checkpoint, files):
    measured(checkpoint, files)
    result = json.loads((files / "result.json").read_text())
    del result["cells"]["perplexity/one.txt"]["digest"]
    (files / "result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match=r"result\.json is damaged"):
        measured(checkpoint, files)
