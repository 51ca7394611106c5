"""Suites as they are written: files, names, and what is wrong with them."""

from __future__ import annotations

import pytest

from dualroute.cli import parse_stage
from dualroute.errors import UserError
from dualroute.evaluate.suite.config import KINDS, PerplexitySettings, read_suite, shipped_suites, with_flags


def written(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_every_kind_has_a_shipped_suite_that_reads(monkeypatch):
    monkeypatch.setenv("DUALROUTE_DATA", "/data")
    kinds = {part.kind for name in shipped_suites() for part in read_suite(name).parts}
    assert kinds == set(KINDS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("parts: []", "at least one part"),
        ("part: x", "unknown key 'part'"),
        ("parts: [{part: perplexit}]", "did you mean perplexity"),
        (
            "parts:\n  - part: ruler\n    lenghts: [1024]",
            "unknown key 'lenghts' in .*mine.yaml:3; did you mean 'len",
        ),
        ("parts:\n  - part: ruler\n    lengths: [10]", "mine.yaml:3: lengths is .*at least 64"),
        ("parts:\n  - part: ruler\n    tasks: []", "empty list"),
        ("parts: [{part: lm_eval}]", "tasks is empty"),
        ("parts: [{part: ruler, samples: many}]", "expected an integer"),
        ("parts: [{part: ruler}, {part: ruler}]", "give name"),
        ("parts: [{part: ruler", "not valid YAML"),
        ("parts: [ruler]", "a table with the key part"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        read_suite(written(tmp_path, text))


def test_an_unknown_suite_names_the_nearest():
    with pytest.raises(UserError, match="did you mean ruler"):
        read_suite("rulr")


def test_flags_reach_the_parts_that_have_them(tmp_path):
    suite = read_suite(
        written(tmp_path, "parts: [{part: ruler}, {part: perplexity, text: [a], convention: wikitext}]")
    )
    ruler, perplexity = with_flags(suite, {"lengths": [1024], "text": ["b"], "data": None}).parts
    assert ruler.lengths == [1024]
    assert isinstance(perplexity, PerplexitySettings)
    assert (perplexity.text, perplexity.convention) == (["b"], "none")
    with pytest.raises(UserError, match="--stride says nothing"):
        with_flags(read_suite("ruler"), {"stride": 3})


def test_several_words_after_the_flag_of_a_list(tmp_path):
    config = parse_stage("evaluate", "--checkpoint c --suite ruler --lengths 4096 16384 --samples 2".split())
    assert (config.lengths, config.samples) == ([4096, 16384], 2)
    with pytest.raises(UserError, match="'16384' is no option"):
        parse_stage("evaluate", "--checkpoint c --samples 4096 16384".split())


@pytest.mark.parametrize("flag", ["--lengths 64", "--samples 3", "--compare x.json"])
def test_options_of_a_suite_need_one(flag):
    with pytest.raises(UserError, match="without a suite"):
        parse_stage("evaluate", f"--checkpoint c --data d {flag}".split())
