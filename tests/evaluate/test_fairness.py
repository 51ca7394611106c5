"""Scores of bias: by hand on small sets, their intervals, and what may be called a difference."""

import gzip
import json

import numpy as np
import pytest
import torch

from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.evaluate import fairness
from dualroute.evaluate.fairness import compare, log_likelihoods, measure
from dualroute.model import DualRoutingTransformer
from tests.conftest import smallest_model


@pytest.fixture(scope="module")
def tokenizer(tiny_dataset):
    return Tokenizer(tiny_dataset / "tokenizer.model")


@pytest.fixture(scope="module")
def model(tokenizer):
    return smallest_model(tokenizer.vocab_size, 256)


def question(polarity, condition, label, index):
    return {
        "question_index": str(index), "question_polarity": polarity, "context_condition": condition,
        "category": "Age", "context": "an old bird and a young bird", "question": "which?", "label": label,
        "ans0": "old one", "ans1": "young one", "ans2": "unknown",
        "answer_info": {"ans0": ["bird", "old"], "ans1": ["chick", "nonOld"], "ans2": ["?", "unknown"]},
        "additional_metadata": {"stereotyped_groups": ["Old"]},
    }  # fmt: skip


@pytest.fixture
def sets(tmp_path):
    lines = ["n,sent_more,sent_less,bias_type"]
    lines += [
        f"{number},the old bird {number},the young bird {number},{'age' if number % 3 else 'other'}"
        for number in range(40)
    ]
    with gzip.open(tmp_path / "crows_pairs_anonymized.csv.gz", "wt") as stream:
        stream.write("\n".join(lines))
    (tmp_path / "winobias").mkdir()
    for kind in ("type1", "type2"):
        for part in ("dev", "test"):
            for side, word in (("pro", "he"), ("anti", "she")):
                path = tmp_path / "winobias" / f"{side}_stereotyped_{kind}.txt.{part}"
                path.write_text(
                    "".join(f"{k} [The bird {k}] slept because [{word}] was old.\n" for k in range(5))
                )
    (tmp_path / "bbq").mkdir()
    rows = [
        question("neg", "ambig", 2, 0),
        question("nonneg", "ambig", 2, 1),
        question("neg", "disambig", 1, 2),
    ]
    rows += [question("nonneg", "disambig", 0, 3)]
    (tmp_path / "bbq" / "Age.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def scripted(monkeypatch, values):
    monkeypatch.setattr(
        fairness, "log_likelihoods", lambda model, tokenizer, asked: list(values[: len(asked)])
    )


@torch.no_grad()
def test_likelihoods_are_sums_of_log_probabilities_in_any_company(model, tokenizer):
    asked = [
        ("", "the old bird"),
        ("the river", " sleeps"),
        ("", "a"),
        ("", "the red stone and the river " * 4),
    ]
    found = log_likelihoods(model, tokenizer, asked)
    for (prompt, text), value in zip(asked, found, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt + text, bos=True)])
        given = len(tokenizer.encode(prompt, bos=True))
        logprobs = model(ids)[0].log_softmax(-1)
        expected = sum(float(logprobs[at - 1, ids[0, at]]) for at in range(given, ids.shape[1]))
        assert value == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UserError, match="reads at most 256"):
        log_likelihoods(model, tokenizer, [("", "old river " * 200)])


def test_crows_pairs_and_winobias_count_what_is_likelier(monkeypatch, model, tokenizer, sets):
    pairs = [(1.0, 0.0) if number < 30 else (0.0, 1.0) for number in range(40)]
    scripted(monkeypatch, [value for pair in pairs for value in pair])
    scores = measure(model, tokenizer, "crows_pairs", folder=sets)
    whole = scores["crows_pairs"]
    assert (whole.value, whole.items) == (0.75, 40)
    assert whole.low < 0.75 < whole.high
    assert whole.standard_error == pytest.approx(np.sqrt(0.75 * 0.25 / 40), rel=0.1)
    assert whole.is_biased
    assert scores["crows_pairs/age"].items + scores["crows_pairs/other"].items == 40
    scripted(monkeypatch, [0.0, 0.0] * 20)
    scores = measure(model, tokenizer, "winobias", folder=sets)
    assert (scores["winobias"].value, scores["winobias"].items) == (0.5, 20)
    assert not scores["winobias"].is_biased
    assert set(scores) == {"winobias", "winobias/type1", "winobias/type2", "winobias/male"}
    scripted(monkeypatch, [1.0, 0.0] * 15 + [0.0, 1.0] * 5)  # the text of the stereotype has "he"
    assert measure(model, tokenizer, "winobias", folder=sets)["winobias/male"].value == 0.75
    for side, word in (("pro", "her"), ("anti", "his")):
        for path in (sets / "winobias").glob(f"{side}_*"):
            path.write_text("".join(f"{k} The bird {k} saw [{word}] stone.\n" for k in range(5)))
    assert measure(model, tokenizer, "winobias", folder=sets)["winobias/male"].value == 0.25


def test_bbq_has_the_scores_of_its_paper(monkeypatch, model, tokenizer, sets):
    # the group; the other one, of a question whose biased answer is that; unknown; right
    scripted(monkeypatch, [2, 1, 0, 1, 2, 0, 0, 1, 2, 2, 1, 0])
    scores = measure(model, tokenizer, "bbq", folder=sets)
    assert scores["bbq/ambig/accuracy"].value == 0
    assert scores["bbq/ambig/bias"].value == 1  # (1 - accuracy) (2 * 2 / 2 - 1)
    assert scores["bbq/disambig/accuracy"].value == 0.5
    assert scores["bbq/disambig/bias"].value == -1  # one answer, and that against the stereotype
    assert scores["bbq/Age/disambig/bias"].items == 1
    scripted(monkeypatch, [0, 1, 2, 1, 0, 0, 0, 1, 2, 2, 1, 0])
    assert measure(model, tokenizer, "bbq", folder=sets)["bbq/ambig/bias"].value == -0.5


def test_a_difference_within_its_interval_is_none(monkeypatch, model, tokenizer, sets):
    def scored(count):
        scripted(monkeypatch, [v for k in range(40) for v in ((1.0, 0.0) if k < count else (0.0, 1.0))])
        return measure(model, tokenizer, "crows_pairs", folder=sets)

    (same, *_) = compare(scored(20), scored(20))
    assert (same.difference, same.low, same.high, same.is_difference) == (0, 0, 0, False)
    (small, *_) = compare(scored(20), scored(21))
    assert small.difference == pytest.approx(0.025)
    assert not small.is_difference
    (large, *_) = compare(scored(10), scored(30))
    assert large.is_difference
    assert large.low < 0.5 < large.high
    with pytest.raises(UserError, match="asked other items"):
        compare(scored(10), measure(model, tokenizer, "crows_pairs", folder=sets, max_items=10))


def test_real_sets_are_read(real_data, model, tokenizer):
    scores = measure(model, tokenizer, "crows_pairs", folder=real_data / "fairness", max_items=20)
    assert scores["crows_pairs"].items == 20
    counts = {name: len(one.read(one.place(real_data / "fairness"))) for name, one in fairness.SETS.items()}
    assert counts == {"crows_pairs": 1508, "winobias": 1584, "bbq": 11956}
    unknown = [
        item for item in fairness.SETS["bbq"].read(real_data / "fairness" / "bbq") if item.facts[3] < 0
    ]
    assert len(unknown) < 100


def test_what_cannot_be_scored_is_named(model, tokenizer, sets, monkeypatch):
    with pytest.raises(UserError, match="no fairness set 'crows'; choose crows_pairs"):
        measure(model, tokenizer, "crows", folder=sets)
    with pytest.raises(UserError, match=r"crows_pairs_anonymized.csv.gz is not there"):
        measure(model, tokenizer, "crows_pairs", folder=sets / "bbq")
    (sets / "bbq" / "Age.jsonl").write_text('{"label": 7}\n')
    with pytest.raises(UserError, match=r"Age.jsonl:1: no question of BBQ"):
        measure(model, tokenizer, "bbq", folder=sets)
    (sets / "crows_pairs_anonymized.csv.gz").write_bytes(b"\x1f\x8bno")
    with pytest.raises(UserError, match="cannot be read"):
        measure(model, tokenizer, "crows_pairs", folder=sets)
    monkeypatch.delenv("DUALROUTE_DATA", raising=False)
    with pytest.raises(UserError, match="set DUALROUTE_DATA"):
        measure(model, tokenizer, "winobias")
    broken = DualRoutingTransformer(model.config)
    torch.nn.init.constant_(broken.norm.weight, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        measure(broken, tokenizer, "winobias", folder=sets)
