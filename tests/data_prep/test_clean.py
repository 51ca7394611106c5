"""Cleaning is idempotent, and each drop is counted under its reason."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.clean import Selection, in_validation, matches, select, tail_start
from data_prep.cleaning.text import clean_text
from data_prep.readers.documents import Document


def run(texts, **options):
    dropped: Counter[str] = Counter()
    kept = list(select((Document(f"d{n}", t) for n, t in enumerate(texts)), Selection(**options), dropped))
    return kept, dict(dropped)


@given(st.text())
def test_clean_text_is_idempotent_and_leaves_only_newline_and_tab_of_the_controls(text):
    once = clean_text(text)
    assert clean_text(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert {c for c in once if unicodedata.category(c) == "Cc"} <= {"\n", "\t"}


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\r\nb\rc\x85d\n", "a\nb\nc\nd\n"),
        ("a\x00b\x1b[1mc\x7f", "ab[1mc"),
        ("\ufeffe\u0301t\u00e9", "été"),
        ("  indented\n\n\tas it was  ", "  indented\n\n\tas it was  "),
    ],
)
def test_clean_text_examples(text, cleaned):
    assert clean_text(text) == cleaned


def test_a_long_run_of_accents_takes_no_hour():
    """Sorting 200,000 of them takes Python's NFC ten minutes."""
    hostile = "e\u0301 " + "a" + "\u0301\u0323" * 100_000 + "e\u0301"
    once = clean_text(hostile)
    assert clean_text(once) == once
    assert once.startswith("\u00e9 a\u0301\u0323")
    assert once.endswith("\u0323\u00e9")
    assert len(once) == len(hostile) - 2
    accents = "x" * 1000 + "o" + "\u0323\u0302" * 10 + "e\u0301"
    assert clean_text(accents) == unicodedata.normalize("NFC", accents)


@pytest.mark.parametrize("last", ["\u0958", "\u1e69", "\u0344", "\ufb2c"])
def test_text_before_a_long_run_is_cleaned_once(last):
    """Some letters are spelled with accents after NFC, which then join the run."""
    text = "x" * 1000 + last + "\u0323" * 64 + "\u0301" + last
    once = clean_text(text)
    assert clean_text(once) == once


def test_every_drop_is_counted_under_its_reason():
    kept, dropped = run(
        ["fine text", "", " \n\t", "abc", "x" * 50, "fine text", "fine\r text", "other text"],
        min_chars=5,
        max_chars=20,
    )
    assert [d.name for d in kept] == ["d0", "d6", "d7"]
    assert dropped == {"empty": 2, "too_short": 1, "too_long": 1, "duplicate": 1}


def test_duplicates_are_found_after_cleaning():
    kept, dropped = run(["caf\u00e9\n", "cafe\u0301\r\n"])
    assert len(kept) == 1
    assert dropped == {"duplicate": 1}


def test_size_and_digest_are_of_the_cleaned_text():
    (document,), _ = run(["caf\u00e9\r\n"])
    assert document.text == "café\n"
    assert document.num_bytes == 6
    assert document.digest == hashlib.sha256("café\n".encode()).digest()


def test_the_limits_stop_the_reading():
    def endless():
        number = 0
        while True:
            number += 1
            yield Document(str(number), f"text number {number:04d}")  # 16 bytes

    def count(**options):
        return len(list(select(endless(), Selection(**options), Counter())))

    assert count(max_documents=7) == 7
    assert count(max_bytes=160) == 10
    assert count(max_bytes=161) == 11
    assert count(max_bytes=1) == 1


@given(st.integers(0, 2**32), st.floats(0.01, 0.5))
def test_a_larger_fraction_holds_out_the_same_documents_and_more(seed, fraction):
    digests = [hashlib.sha256(bytes([n])).digest() for n in range(100)]
    small = {d for d in digests if in_validation(d, fraction, seed)}
    assert small <= {d for d in digests if in_validation(d, fraction * 1.5, seed)}


def test_the_held_out_share_is_near_the_fraction_and_follows_the_seed():
    digests = [hashlib.sha256(n.to_bytes(4, "big")).digest() for n in range(20000)]
    chosen = [{d for d in digests if in_validation(d, 0.05, seed)} for seed in (0, 1)]
    for held_out in chosen:
        assert abs(len(held_out) - 1000) < 5 * (20000 * 0.05 * 0.95) ** 0.5  # 5 standard deviations
    assert chosen[0] != chosen[1]


def test_the_split_depends_on_the_text_alone():
    texts = [f"text {n}" for n in range(200)]
    there, _ = run(texts, val_fraction=0.3)
    back, _ = run(texts[::-1], val_fraction=0.3)
    assert {d.text: d.split for d in there} == {d.text: d.split for d in back}
    assert {d.split for d in there} == {"train", "val"}


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("books.tar!a/moby-dick.txt", True),
        ("moby-dick.txt", True),
        ("moby-dick", True),
        ("moby*", True),
        ("*/moby-dick.txt", True),
        ("dick", False),
        ("Moby-dick", False),
        ("a", False),
    ],
)
def test_names_match_whole_by_last_part_or_without_ending(pattern, fits):
    assert matches("books.tar!a/moby-dick.txt", pattern) is fits


def test_held_out_by_name_replaces_the_fraction():
    matched: set[str] = set()
    selection = Selection(val_documents=("d1", "d9", "none"), val_fraction=0.9)
    documents = (Document(f"d{n}", f"text {n}") for n in range(20))
    kept = list(select(documents, selection, Counter(), matched))
    assert [d.name for d in kept if d.split == "val"] == ["d1", "d9"]
    assert matched == {"d1", "d9"}


@given(st.text(alphabet="ab \n", min_size=0, max_size=300), st.floats(0.01, 0.9))
def test_the_tail_of_a_text_is_near_the_share_and_both_parts_hold_text(text, fraction):
    start = tail_start(text, fraction)
    wanted = len(text) * (1 - fraction)
    if start is None:
        place = max(1, min(round(wanted), len(text) - 1))
        assert not text[:place].strip() or not text[place:].strip()
        return
    assert text[:start].strip()
    assert text[start:].strip()
    assert abs(start - wanted) <= max(1.0, len(text) * min(fraction, 1 - fraction) / 2)


@pytest.mark.parametrize(
    ("text", "tail"),
    [
        ("one\n\ntwo three\nfour\n\nfive", "five"),
        ("one two three\nfour five six seven\neight", "eight"),
        ("onetwothreefourfivesix seven", "seven"),
        ("abcdefgh", "gh"),
        ("x", None),
        ("", None),
        ("text" + " " * 30, None),
    ],
)
def test_a_tail_starts_at_the_nearest_border(text, tail):
    start = tail_start(text, 0.25)
    assert (text[start:] if start is not None else None) == tail


def test_the_end_of_each_document_can_be_held_out():
    kept, _ = run(["first part\n\nsecond part"], val_tail=True, val_fraction=0.5)
    assert [(d.name, d.text, d.split) for d in kept] == [
        ("d0", "first part\n\n", "train"),
        ("d0#tail", "second part", "val"),
    ]
    assert all(d.digest == hashlib.sha256(d.text.encode()).digest() for d in kept)
