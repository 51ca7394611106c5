"""lm-evaluation-harness asks our model, and its own ``hf`` model on our export, and hears the same."""

from __future__ import annotations

import csv
import json
import logging

import pytest
import torch

from dualroute.errors import UserError
from dualroute.evaluate.load import load_any
from dualroute.evaluate.suite.config import HarnessSettings
from dualroute.evaluate.suite.model import SuiteModel
from dualroute.model.checkpoint.format import save_model
from tests.conftest import WORDS

lm_eval = pytest.importorskip("lm_eval")

from dualroute.evaluate.parts import harness  # noqa: E402
from dualroute.evaluate.parts.harness_model import HarnessModel  # noqa: E402

SENTENCES = [" ".join(WORDS[k : k + 5]).capitalize() + "." for k in range(8)]


@pytest.fixture(scope="module")
def lettered(checkpoint, tmp_path_factory):
    """The tiny checkpoint, made to write no bytes, of which two libraries spell broken ones apart."""
    model = load_any(checkpoint).model
    pieces = load_any(checkpoint).tokenizer.pieces()
    with torch.no_grad():
        model.embedding.weight[[k for k, piece in enumerate(pieces) if piece.startswith("<")]] = 0.0
    folder = tmp_path_factory.mktemp("lettered") / "checkpoint"
    save_model(model, folder, load_any(checkpoint).tokenizer.path, {"context": 64})
    return folder


@pytest.fixture(scope="module")
def exported(lettered, tmp_path_factory):
    """It as a Hugging Face folder."""
    from dualroute.export.command import export_command
    from dualroute.export.config import ExportConfig

    folder = tmp_path_factory.mktemp("export") / "hf"
    export_command(ExportConfig(checkpoint=str(lettered), output=str(folder), format="hf"))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file for each of the local tasks."""
    folder = tmp_path_factory.mktemp("files")
    rows = ["sentence\tlabel", *(f"{text}\t{k % 2}" for k, text in enumerate(SENTENCES))]
    (folder / "sst2.tsv").write_text("\n".join(rows) + "\n")
    (folder / "wiki.txt").write_text(
        "".join(f" = Title {k} = \n \n {text} \n" * 3 for k, text in enumerate(SENTENCES))
    )
    qas = [{"question": "What sleeps?", "answers": [{"text": "stone"}]}]
    squad = {"data": [{"paragraphs": [{"context": text, "qas": qas} for text in SENTENCES]}]}
    (folder / "squad.json").write_text(json.dumps(squad))
    with (folder / "crows.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["", "sent_more", "sent_less", "bias_type"])
        writer.writerows(
            [k, a, b, "age"] for k, (a, b) in enumerate(zip(SENTENCES, SENTENCES[::-1], strict=True))
        )
    asked = {
        "context": SENTENCES[0], "question": "Who?", "category": "Age", "context_condition": "ambig",
        "question_polarity": "neg", "question_index": "1", "label": 2,
        "additional_metadata": {"stereotyped_groups": ["old"]},
        "answer_info": {"ans0": ["x", "old"], "ans1": ["y", "nonOld"], "ans2": ["z", "unknown"]},
        "ans0": "The stone", "ans1": "The bird", "ans2": "Nobody knows",
    }  # fmt: skip
    (folder / "bbq.jsonl").write_text("".join(json.dumps(asked) + "\n" for _ in range(4)))
    return {
        "local_sst2": str(folder / "sst2.tsv"),
        "local_wikitext": str(folder / "wiki.txt"),
        "local_xquad": str(folder / "squad.json"),
        "local_crows_pairs": str(folder / "crows.csv"),
        "local_bbq": str(folder / "bbq.jsonl"),
    }


@pytest.mark.slow
def test_answers_are_those_of_the_hf_model_on_the_export(lettered, exported):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    for name in ("lm_eval", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    theirs = HFLM(
        pretrained=str(exported),
        trust_remote_code=True,
        dtype="float32",
        max_length=128,
        device="cpu",
        batch_size=3,
    )
    models = [HarnessModel(SuiteModel(load_any(path), 3)) for path in (lettered, exported)]

    def asked(kind, *arguments):
        return [Instance(kind, {}, one, 0) for one in arguments]

    long = " ".join(SENTENCES * 3)
    pairs = [
        (context, answer) for context in ("", "The old", long) for answer in (" red stone", " bird", "x")
    ]
    rolling = asked("loglikelihood_rolling", *((text,) for text in (SENTENCES[0], long)))
    likelihoods = asked("loglikelihood", *pairs)
    expected = theirs.loglikelihood(likelihoods, disable_tqdm=True)
    whole = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
    options = {"until": ["\n"], "max_gen_toks": 12}
    written = asked("generate_until", *((text, options) for text in (SENTENCES[1], "The", long)))
    texts = theirs.generate_until(written, disable_tqdm=True)
    assert any(texts)
    for model in models:
        found = model.loglikelihood(likelihoods)
        assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-4)
        assert [one[1] for one in found] == [one[1] for one in expected]
        assert model.loglikelihood_rolling(rolling) == pytest.approx(whole, rel=1e-5, abs=1e-4)
        assert model.generate_until(written) == texts


def test_local_tasks_have_scores_with_errors(checkpoint, files):
    settings = HarnessSettings(tasks=list(files), files=files, samples=4)
    made = harness.cells(settings, SuiteModel(load_any(checkpoint), 4))
    assert [cell.name for cell in made] == list(files)
    found = {cell.name: {score.metric: score for score in cell.measure().scores} for cell in made}
    assert set(found["local_wikitext"]) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert set(found["local_xquad"]) == {"exact_match", "f1"}
    for scores in found.values():
        for score in scores.values():
            assert score.stderr is not None
            assert score.n == 4
    again = harness.cells(settings, SuiteModel(load_any(checkpoint), 4))
    assert [cell.digest({}) for cell in again] == [cell.digest({}) for cell in made]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tasks": ["local_sst"]}, "did you mean local_sst2"),
        ({"tasks": ["local_sst2"], "files": {"local_sst": "x"}}, "did you mean local_sst2"),
        ({"tasks": ["local_sst2"], "files": {"local_sst2": "/nowhere"}}, "/nowhere is not there"),
        ({"tasks": ["local_sst2"], "include": "/nowhere"}, "is no folder"),
        ({"tasks": ["local_sst2"]}, r"in \$DUALROUTE_DATA, and it is not there"),
    ],
)
def test_what_cannot_be_asked_is_said(checkpoint, monkeypatch, settings, said):
    monkeypatch.delenv("DUALROUTE_DATA", raising=False)
    monkeypatch.setattr(harness, "_stock", lambda *_: False)
    with pytest.raises(UserError, match=said):
        harness.cells(HarnessSettings(**settings), SuiteModel(load_any(checkpoint)))


def test_a_label_outside_the_choices_and_an_empty_set_are_named(checkpoint, tmp_path):
    file = tmp_path / "rows.tsv"
    settings = HarnessSettings(tasks=["local_sst2"], files={"local_sst2": str(file)})
    for content, said in (
        ("sentence\tlabel\nx\t7\n", "line 2: the label '7'"),
        ("sentence\tlabel\n", "nothing to ask"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=said):
            harness.cells(settings, SuiteModel(load_any(checkpoint)))


def test_a_missing_harness_names_its_extra(checkpoint, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[eval\]'"):
        harness.cells(HarnessSettings(tasks=["local_sst2"]), SuiteModel(load_any(checkpoint)))
