"""The sample is bounded and does not depend on order; training is deterministic and explains its limits."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.train_tokenizer import PIECE_CHARS, Sample, cut, train_tokenizer
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from tests.data_prep.conftest import story

TEXTS = [story(n) for n in range(40)]


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@given(st.text(alphabet="ab\n", max_size=200), st.integers(1, 20))
def test_cut_loses_nothing_and_respects_the_limit(text, limit):
    pieces = list(cut(text, limit))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)
    for piece in pieces[:-1]:  # in the middle of a line only where the line is too long
        assert piece.endswith("\n") or "\n" not in piece


@given(st.randoms(use_true_random=False), st.integers(500, 20_000))
def test_the_sample_is_bounded_and_does_not_depend_on_the_order(order, budget):
    texts = list(TEXTS)
    order.shuffle(texts)
    samples = [Sample(budget, seed=1), Sample(budget, seed=1)]
    for sample, documents in zip(samples, (TEXTS, texts), strict=True):
        for text in documents:
            sample.add(digest(text), text)
    assert samples[0].texts() == samples[1].texts()
    assert samples[0].size == sum(len(t.encode()) for t in samples[0].texts()) <= max(budget, PIECE_CHARS * 4)


def test_the_sample_takes_everything_if_it_fits_and_follows_the_seed():
    samples = [Sample(10**9, 0), Sample(5000, 0), Sample(5000, 1)]
    for sample in samples:
        for text in TEXTS:
            sample.add(digest(text), text)
    assert sorted(samples[0].texts()) == sorted(piece for text in TEXTS for piece in cut(text))
    assert samples[1].texts() != samples[2].texts()
    assert 3000 < samples[1].size <= 5000


def test_a_long_document_does_not_fill_the_sample():
    """Pieces are drawn, not documents: each side contributes by its share of the text."""
    sample = Sample(100_000)
    long = "".join(f"long line {n}\n" for n in range(60_000))
    short = [f"short {n}\n" * 150 for n in range(600)]
    for text in [long, *short]:
        sample.add(digest(text), text)
    share = sum(len(t) for t in sample.texts() if t.startswith("long")) / sample.size
    expected = len(long) / (len(long) + sum(map(len, short)))
    assert abs(share - expected) < 0.2


@pytest.mark.parametrize("tokenizer_type", ["bpe", "unigram"])
def test_training_is_deterministic(tokenizer_type):
    first, second = (train_tokenizer(iter(TEXTS), 370, tokenizer_type, 4) for _ in range(2))
    assert first == second
    assert first != train_tokenizer(iter(TEXTS), 371, tokenizer_type, 4)


@pytest.mark.parametrize("tokenizer_type", ["bpe", "unigram"])
def test_too_large_a_vocabulary_names_the_largest_that_works(tokenizer_type):
    texts = TEXTS[:3]
    with pytest.raises(UserError, match="vocab_size 50000 is larger than the corpus allows") as error:
        train_tokenizer(texts, 50_000, tokenizer_type)
    largest = int(str(error.value).split("largest possible is ")[1].split(":")[0])
    train_tokenizer(texts, largest, tokenizer_type)
    with pytest.raises(UserError, match=f"largest possible is {largest}"):
        train_tokenizer(texts, largest + 1, tokenizer_type)


def test_too_small_a_vocabulary_names_the_smallest():
    with pytest.raises(UserError, match=r"vocab_size 200 is too small: .* need at least (\d+)") as error:
        train_tokenizer(TEXTS, 200)
    smallest = int(str(error.value).split("at least ")[1].split(";")[0])
    train_tokenizer(TEXTS, smallest)


def test_nothing_to_train_on():
    with pytest.raises(UserError, match="cannot be trained on this text"):
        train_tokenizer([], 400)


@pytest.mark.parametrize("mark", ["\t", "\n", " ", "\u2585", "\u2581"])
def test_words_between_any_marks_are_learnt(tmp_path, mark):
    """sentencepiece alone would skip texts with U+2585."""
    draw = random.Random(0)
    texts = [mark.join(draw.choices(["alphabet", "parameter", "wonderful"], k=50)) for _ in range(20)]
    (tmp_path / "t.model").write_bytes(train_tokenizer(texts, 300, reserved_tokens=0))
    tokenizer = Tokenizer(tmp_path / "t.model")
    assert [len(tokenizer.encode(word)) for word in ("alphabet", "parameter", "wonderful")] == [1, 1, 1]


def test_reserved_tokens_have_ids_of_their_own(tmp_path):
    (tmp_path / "t.model").write_bytes(train_tokenizer(TEXTS, 400, reserved_tokens=7))
    tokenizer = Tokenizer(tmp_path / "t.model")
    assert tokenizer.decode(range(4, 11)) == ""
    assert len(tokenizer.encode("<reserved_0>")) > 1


@pytest.mark.parametrize(("vocab_size", "reserved"), [(10**12, 16), (400, 10**9), (-1, 0)])
def test_a_vocabulary_of_an_impossible_size(vocab_size, reserved):
    with pytest.raises(UserError, match=r"^vocab_size -?\d+ must be more than .*; change vocab_size$"):
        train_tokenizer(TEXTS, vocab_size, reserved_tokens=reserved)
