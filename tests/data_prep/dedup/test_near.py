"""Planted near duplicates are found, others are not, whatever the memory and the order of work."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

pytest.importorskip("rensa", reason="near duplicates need rensa (extra prepare)")

from data_prep.dedup.near import NEAR, SAME, STAYS, Documents, Duplicates, merged, write_pairs
from data_prep.dedup.signatures import Banding, signatures
from data_prep.dedup.signed_part import SignedPart, signed_bytes

SIMILARITY = 0.7


def fates(texts, folder, cut=(), records=1 << 20, similarity=SIMILARITY, order=None) -> Duplicates:
    folder.mkdir(exist_ok=True)
    banding = Banding.of(similarity)
    parts = []
    for number, (first, last) in enumerate(zip((0, *cut), (*cut, len(texts)), strict=True)):
        some = texts[first:last]
        part = SignedPart(folder / f"{number}.signed", len(some), banding)
        digests = [hashlib.sha256(text.encode()).digest() for text in some]
        part.write(signed_bytes(digests, signatures(some), banding))
        parts.append(part)
    documents = Documents(parts, similarity, records)
    paths = [folder / f"column-{column}" for column in range(documents.columns)]
    for column in order or range(documents.columns):
        write_pairs(paths[column], *documents.pairs(column, folder))
    return merged(len(texts), paths)


def words(draw: random.Random, language: str, count: int) -> list[str]:
    if language == "zh":
        return [chr(draw.randrange(0x4E00, 0x5E00)) for _ in range(count)]
    return ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(count)]


def changed(draw: random.Random, text: list[str], share: float, language: str) -> list[str]:
    """``share`` of the shingles of five are broken: as many words are exchanged as that takes."""
    text = list(text)
    for place in draw.sample(range(0, len(text), 5), max(1, round(share * len(text) / 5))):
        text[place] = words(draw, language, 1)[0]
    return text


def planted(language: str, pairs: int = 150) -> tuple[list[str], np.ndarray]:
    """Texts, and for each whether it is a copy with few changes; others share half of their text or
    nothing."""
    draw = random.Random(language)
    join = "" if language == "zh" else " "
    texts, copies = [], []
    for number in range(pairs):
        original = words(draw, language, draw.randint(60, 400))
        texts.append(original)
        copies.append(False)
        kind = number % 3
        if kind == 0:
            # Jaccard of about (1 - s) / (1 + s): 0.9 and more
            texts.append(changed(draw, original, 0.05, language))
            copies.append(True)
        elif kind == 1:
            texts.append(changed(draw, original, 0.5, language))  # a third
            copies.append(False)
    order = list(range(len(texts)))
    return [join.join(texts[place]) for place in order], np.array(copies)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_planted_near_duplicates_are_told_from_what_is_merely_alike(language, tmp_path) -> None:
    texts, copies = planted(language)
    found = fates(texts, tmp_path / "all").fates == NEAR
    scores = []
    for positive in (True, False):
        hits = np.count_nonzero((found == positive) & (copies == positive))
        wrong = np.count_nonzero(found != copies)
        scores.append(2 * hits / (2 * hits + wrong))
    assert np.mean(scores) >= 0.95, scores  # macro-F1


def test_the_result_depends_neither_on_parts_nor_on_memory_nor_on_order(tmp_path) -> None:
    texts, _ = planted("en", 60)
    texts += texts[:7]
    whole = fates(texts, tmp_path / "whole")
    others = (
        fates(texts, tmp_path / "cut", cut=(1, 30, 30, 77)),
        fates(texts, tmp_path / "small", cut=(50,), records=16),
        fates(texts, tmp_path / "backwards", order=range(Banding.of(SIMILARITY).bands, -1, -1)),
    )
    for other in others:
        assert np.array_equal(whole.fates, other.fates)
        assert np.array_equal(whole.of, other.of)


def test_equal_texts_are_the_same_and_point_at_the_first(tmp_path) -> None:
    texts, _ = planted("en", 3)
    texts = [texts[0], texts[2], texts[0], texts[0], "!?", "...", "", "!?"]
    found = fates(texts, tmp_path / "x")
    assert found.fates.tolist() == [STAYS, STAYS, SAME, SAME, STAYS, STAYS, STAYS, SAME]
    assert found.of.tolist() == [-1, -1, 0, 0, -1, -1, -1, 4]


def test_wrapping_case_and_punctuation_make_no_difference(tmp_path) -> None:
    english = "The cat sat on the mat, and the dog lay down beside it while it rained."
    chinese = "今天天气很好，我们一起去公园散步吧。"
    texts = [english, english.upper().replace(" ", "\n\t"), chinese, chinese.replace("，", "\n")]
    assert fates(texts, tmp_path / "x").fates.tolist() == [STAYS, NEAR, STAYS, NEAR]


def test_a_chain_of_likenesses_keeps_its_first(tmp_path) -> None:
    draw = random.Random(1)
    text = words(draw, "en", 300)
    chain = []
    for _ in range(6):
        chain.append(" ".join(text))
        text = changed(draw, text, 0.06, "en")
    assert fates(chain, tmp_path / "x").fates.tolist() == [STAYS, *5 * [NEAR]]


def test_no_document_is_no_duplicate(tmp_path) -> None:
    assert fates([], tmp_path / "x").fates.tolist() == []


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9, 0.95])
def test_bands_bring_similar_pairs_together(similarity) -> None:
    banding = Banding.of(similarity)
    assert banding.bands * banding.rows <= 128
    assert 1 - (1 - similarity**banding.rows) ** banding.bands >= 0.95
    longer = banding.rows + 1
    assert 1 - (1 - similarity**longer) ** (128 // longer) < 0.95


def test_texts_that_are_signed_together_are_signed_as_alone() -> None:
    draw = random.Random(4)
    texts = [" ".join(words(draw, "en", draw.randint(0, 12))) for _ in range(60)]
    texts += ["", "İstanbul ABC", "ΣΑΣ ΟΔΟΣ", "one TWO", "汉字", "x " * 20_000]
    alone = np.concatenate([signatures([text]) for text in texts])
    assert np.array_equal(signatures(texts), alone)
