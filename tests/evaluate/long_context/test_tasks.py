"""The long-context texts: as long as asked for, and the answer stands in them."""

from __future__ import annotations

import gzip
import json
import random
import re

import pytest

from dualroute.errors import UserError
from dualroute.evaluate.long_context.sample import TooShort, matched, samples, scattered
from dualroute.evaluate.long_context.tasks import FACTS, NAMES, POSITIONS, RULER, Library, Sources
from dualroute.evaluate.long_context.words import words

BOOK = "It was a bright cold day. The clocks were striking. Nobody looked up! Why should they? " * 40


def tokens(text: str) -> int:
    """A tokenizer of about four characters a token."""
    return -(-len(text) // 4)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    paragraphs = [
        {
            "context": f"In the year {1900 + n} the town of Place{n} had a mayor called Name{n}. "
            + "More. " * 9,
            "qas": [{"question": f"Who was mayor of Place{n}?", "answers": [{"text": f"Name{n}"}]}],
        }
        for n in range(40)
    ]
    with gzip.open(folder / "squad.json.gz", "wt") as stream:
        json.dump({"data": [{"paragraphs": paragraphs}]}, stream)
    (folder / "book.txt").write_text(BOOK)
    book = str(folder / "book.txt")
    return Library(Sources(book, str(folder / "squad.json.gz"), None, book))


@pytest.mark.parametrize("name", [name for name in NAMES if name != POSITIONS])
@pytest.mark.parametrize("length", [2048, 8192])
def test_texts_fill_the_length_and_hold_their_answers(library, name, length):
    task = library.task(name, length)
    made = samples(task, length, 3, "seed", tokens)
    for sample in made:
        used = tokens(sample.text) + task.new_tokens
        assert 0.85 * length < used <= length
        assert sample.answers
        assert all(answer in sample.text for answer in sample.answers)
        assert not sample.text.endswith(" ")
    assert len({sample.text for sample in made}) == 3
    again = samples(task, length, 3, "seed", tokens)
    assert [sample.text for sample in again] == [sample.text for sample in made]
    assert samples(task, length, 1, "another", tokens)[0].text != made[0].text


def test_thirteen_configurations():
    assert len(RULER) == 13


def test_a_value_is_only_found_behind_the_key_that_is_asked_for(library):
    """Of several keys the text holds other values, which are no answers."""
    for name, others in (("niah_multikey_1", 3), ("niah_multikey_2", 10)):
        sample = samples(library.task(name, 4096), 4096, 1, "s", tokens)[0]
        assert len(sample.answers) == 1
        assert sample.text.count(sample.answers[0]) == 1
        assert sample.text.count("One of the special magic") > others


def test_a_chain_hands_its_value_on(library):
    sample = samples(library.task("vt", 4096), 4096, 1, "s", tokens)[0]
    body = sample.text.rpartition("Memorize")[2]
    value = body.rpartition("assigned the value ")[2].split(",")[0]
    assigned = dict(line.split(" ")[1:4:2] for line in body.split("\n") if line.startswith("VAR "))
    handed = {line.split()[1]: line.split()[-1] for line in body.split("\n") if line.startswith("VAR ")}
    assert len(assigned) == 5
    assert handed[sample.answers[0]] == value
    for before, name in zip(sample.answers, sample.answers[1:], strict=False):
        assert handed[name] == before


def test_the_words_that_are_asked_for_are_the_commonest(library):
    from collections import Counter

    sample = samples(library.task("cwe", 8192), 8192, 1, "s", tokens)[0]
    listed = Counter(sample.text.rpartition("Below is")[2].split("\n")[1].split()[1::2])
    assert {word for word, _ in listed.most_common(10)} == set(sample.answers)
    sample = samples(library.task("fwe", 8192), 8192, 1, "s", tokens)[0]
    coded = Counter(sample.text.split("coded words. ")[1].split("\n")[0].split())
    assert [word for word, _ in coded.most_common(4)][1:] == sample.answers


@pytest.mark.parametrize("name", list(FACTS))
def test_the_last_fact_about_a_person_decides(library, name):
    for sample in samples(library.task(name, 2048), 2048, 6, "s", tokens):
        query = sample.text.rpartition("Question: ")[2]
        holder = query.split("Where is ")[-1].split("?")[0]
        sentences = [one.strip() for one in re.split("[.!?]", sample.text)]
        if name == "facts_1":
            moves = [one for one in sentences if one.startswith(f"{holder} ") and " the " in one]
            assert moves[-1].endswith(f"the {sample.answers[0]}")
        else:
            thing = query.split("the ")[1].split(" ")[0].rstrip("?")
            taken = next(k for k, one in enumerate(sentences) if one.endswith(f"picked up the {thing}"))
            holder = sentences[taken].split()[0]
            moves = [one for one in sentences[taken + 1 :] if one.startswith(f"{holder} ")]
            assert moves[0].endswith(f"the {sample.answers[0]}")


def test_the_second_hop_is_in_the_register(library):
    sample = samples(library.task("qa_2", 4096), 4096, 1, "s", tokens)[0]
    place = sample.text.rpartition("mayor of Place")[2].split("?")[0]
    assert f"the number of Name{place} is {sample.answers[0]}." in sample.text
    assert sample.text.count("Register: ") > 3


def test_scores_are_ruler_s():
    assert matched("The value is ABC and def", ["abc", "x"], "all") == 0.5
    assert matched("abc", ["x", "ABC"], "any") == 1.0
    assert matched("", ["x"], "any") == 0.0


def test_what_does_not_fit_or_is_not_there_is_said(library):
    with pytest.raises(TooShort, match="too few"):
        samples(library.task("cwe", 64), 64, 1, "s", tokens)
    with pytest.raises(UserError, match="did you mean niah_single_1"):
        library.task("niah_single1", 1024)
    with pytest.raises(UserError, match="qa_1 needs paragraphs"):
        Library(Sources()).task("qa_1", 1024)


def test_words_are_all_different():
    assert len(set(words(random.Random(0), 120_000))) == 120_000


def test_needles_keep_their_order():
    pieces, depth = scattered(["-"] * 10, ["a", "b", "c"], random.Random(1))
    assert [one for one in pieces if one != "-"] == ["a", "b", "c"]
    assert len(pieces) == 13
    assert 0 <= depth <= 1
