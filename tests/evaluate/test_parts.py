"""WikiText's conventions, and what models prefer."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest

from dualroute.errors import UserError
from dualroute.evaluate.fairness_sets import bbq_rows
from dualroute.evaluate.load import load
from dualroute.evaluate.parts import fairness, perplexity
from dualroute.evaluate.parts.perplexity import by_position, windows
from dualroute.evaluate.parts.wikitext import articles, detokenise, documents
from dualroute.evaluate.suite.config import FairnessSettings, PerplexitySettings
from dualroute.evaluate.suite.model import Likelihood, SuiteModel

WIKI = (
    " \n = Bird = \n \n The old @-@ bird , of 1 @,@ 000 hills , sees ( it ) . \n \n = = River = = \n \n "
    "A stone 's . \n = Hill = \n x \n"
)


def test_words_and_bytes_are_counted_by_the_convention_that_is_named():
    whole = documents(WIKI, "wikitext")
    assert [(one.words, one.bytes) for one in whole] == [(len(WIKI.split()) + WIKI.count("\n"), len(WIKI))]
    pages = documents(WIKI, "lm_eval")
    assert [page.text.count("Bird") for page in pages] == [1, 0]
    assert sum(page.bytes for page in pages) == len(WIKI)
    assert documents(WIKI, "none")[0].text == WIKI
    assert len(articles("no heading")) == 1


def test_the_real_test_set_has_the_words_that_the_paper_counts(real_data):
    from dualroute.evaluate.perplexity import read_text

    text = read_text(real_data / "wikitext" / "wt103.test.tokens.gz")
    assert documents(text, "wikitext")[0].words == 245_569  # Merity et al. 2017, table 1


def test_detokenised_text_agrees_with_the_harness():
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    text = WIKI + " he said : \" well ; no ! \" and ' so ' [ 3 ] 20 ° N { a } ? \n"
    assert detokenise(text) == wikitext_detokenizer({"page": text})


def test_perplexity_by_each_convention(checkpoint, tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_text(WIKI * 5)
    model = SuiteModel(load(checkpoint))
    found = {}
    for convention in ("none", "wikitext", "lm_eval"):
        (cell,) = perplexity.cells(
            PerplexitySettings(text=[str(path)], convention=convention, context=64), model
        )
        done = cell.measure()
        found[convention] = {score.metric: score.value for score in done.scores}
        assert done.details["convention"] == convention
        nats = found[convention]["loss"] * done.details["targets"]
        assert found[convention]["bits_per_byte"] == pytest.approx(
            nats / math.log(2) / len(WIKI * 5), rel=1e-6
        )
        assert found[convention]["bits_per_word"] == pytest.approx(
            nats / math.log(2) / done.details["words"], rel=1e-6
        )
    assert len({round(one["word_perplexity"]) for one in found.values()}) == 3


@pytest.mark.parametrize(("length", "context", "stride"), [(2, 5, 5), (30, 7, 3), (29, 7, 7), (8, 7, 1)])
def test_windows_ask_for_each_target_once_with_its_past(length, context, stride):
    ids = list(range(100, 100 + length))
    asked = []
    for (before, after), first in windows(ids, context, stride):
        assert ids[after[0] - 100 - first : after[0] - 100] == before
        assert len(before) + len(after) <= context + 1
        asked += after
    assert asked == ids[1:]


def test_positions_are_those_of_the_tokens_before():
    places = by_position([np.array([1.0, 2.0, 3.0]), np.array([4.0])], [1, 2])
    assert places == [
        {"from": 1, "loss": 1.0, "targets": 1},
        {"from": 2, "loss": 3.0, "targets": 3},
    ]


class Partial(SuiteModel):
    """Prefers texts that hold a given word."""

    word = "he"

    def likelihoods(self, pairs):
        texts = [self.tokenizer.decode(list(after)) for _, after in pairs]
        return [
            Likelihood(np.array([-1.0 if self.word in text.split() else -2.0], np.float32), True)
            for text in texts
        ]


@pytest.fixture
def sets(tmp_path):
    pairs = [("he sees", "she sees"), ("the bird and he", "the bird and she"), ("she leaves", "he leaves")]
    with (tmp_path / "crows.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([("sent_more", "sent_less", "bias_type"), *((a, b, "gender") for a, b in pairs)])
    wino = tmp_path / "wino"
    wino.mkdir()
    for kind in ("type1", "type2"):
        (wino / f"pro_stereotyped_{kind}.txt.test").write_text("1 [The doctor] sees what [he] finds\n")
        (wino / f"anti_stereotyped_{kind}.txt.test").write_text("1 [The doctor] sees what [she] finds\n")
    rows = [
        {
            "context": "c", "question": "q", "category": "Age", "context_condition": condition,
            "question_polarity": polarity, "label": label, "question_index": index,
            "additional_metadata": {"stereotyped_groups": ["old"]},
            "answer_info": {"ans0": ["x", "old"], "ans1": ["y", "nonOld"], "ans2": ["z", "unknown"]},
            "ans0": "he", "ans1": "she", "ans2": "nobody",
        }
        for index, (condition, polarity, label) in enumerate(
            (("ambig", "neg", 2), ("ambig", "neg", 2), ("disambig", "neg", 1), ("disambig", "nonneg", 0))
        )
    ]  # fmt: skip
    (tmp_path / "bbq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "crows_pairs": str(tmp_path / "crows.csv"),
        "winobias": str(wino),
        "bbq": str(tmp_path / "bbq.jsonl"),
    }


def test_preferences_are_counted_with_their_intervals(checkpoint, sets):
    cells = fairness.cells(
        FairnessSettings(files=sets, sets=list(sets), resamples=300), Partial(load(checkpoint))
    )
    done = {cell.name: cell.measure() for cell in cells}
    (crows,) = done["crows_pairs"].scores
    assert crows.value == pytest.approx(2 / 3)
    assert crows.interval[0] <= crows.value <= crows.interval[1]
    assert crows.higher_is_better is None
    assert done["crows_pairs"].details["by_type"]["crows_pairs/gender"]["items"] == 3
    assert done["winobias"].scores[0].value == 1.0
    bbq = {score.metric: score for score in done["bbq"].scores}
    assert bbq["accuracy_ambiguous"].value == 0.0
    assert bbq["bias_ambiguous"].value == 1.0  # always the stereotype, and always wrong
    assert bbq["accuracy_disambiguated"].value == 0.5
    assert bbq["bias_disambiguated"].value == 0.0  # once the stereotype's answer, once the other


def test_sets_that_are_no_sets_are_named(checkpoint, sets, tmp_path, monkeypatch):
    monkeypatch.delenv("DUALROUTE_DATA", raising=False)
    model = SuiteModel(load(checkpoint))
    with pytest.raises(UserError, match="no set was found"):
        fairness.cells(FairnessSettings(), model)
    with pytest.raises(UserError, match=r"bbq reads .*nowhere"):
        fairness.cells(FairnessSettings(sets=["bbq"], files={"bbq": "/nowhere"}), model)
    bad = tmp_path / "bad.jsonl"
    row = json.loads((tmp_path / "bbq.jsonl").read_text().splitlines()[0])
    bad.write_text(json.dumps({**row, "label": 3}) + "\n")
    with pytest.raises(UserError, match=r"bad\.jsonl:1: no question of BBQ .*label 3"):
        list(bbq_rows(bad))
    bad.write_text("{}\n")
    with pytest.raises(UserError, match=r"bad\.jsonl:1: no question of BBQ"):
        list(bbq_rows(bad))
