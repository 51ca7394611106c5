"""Hashes of tokens: equal where the tokens are, wherever they stand."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.dedup import shingles as module
from data_prep.dedup.shingles import shingles, tokens


def hashes(text: str) -> list[int]:
    return [int(value) for block, _, _ in tokens(text) for value in block]


@given(st.text(alphabet="ab1_ é.,\n你好た", max_size=60))
def test_tokens_are_words_and_single_letters_of_scripts_without_spaces(text) -> None:
    expected = list(re.finditer("[你好た]|[ab1_é]+", text))
    found = [
        (start, alone)
        for _, starts, unspaced in tokens(text)
        for start, alone in zip(starts, unspaced, strict=True)
    ]
    assert [start for start, _ in found] == [match.start() for match in expected]
    assert [alone for _, alone in found] == [match[0] in "你好た" for match in expected]
    numbers = hashes(text)
    names = [match[0] for match in expected]
    assert [names.index(name) for name in names] == [numbers.index(number) for number in numbers]


def test_case_does_not_matter_and_letters_do() -> None:
    assert hashes("Straße ABC") == hashes("straße abc")
    assert hashes("abc") != hashes("acb")
    assert hashes("a") != hashes("aa")


def test_blocks_leave_no_trace(monkeypatch) -> None:
    text = " ".join(f"word{number}" for number in range(400)) + "汉字" * 50
    whole = np.concatenate(list(shingles(text)))
    monkeypatch.setattr(module, "BLOCK", 64)
    pieces = np.concatenate(list(shingles(text)))
    # but for the few words that a border cut in a text without spaces
    assert len(np.intersect1d(whole, pieces)) == len(np.unique(whole))


@pytest.mark.parametrize("text", ["", " \n", "!?…—", "\ud800"])
def test_no_token_no_hash(text) -> None:
    assert list(shingles(text)) == []


def test_few_tokens_make_one_hash() -> None:
    assert [len(block) for block in shingles("one two")] == [1]
    assert not np.array_equal(next(shingles("one two")), next(shingles("two one")))
