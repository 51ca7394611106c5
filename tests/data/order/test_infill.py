"""Documents told in another order: the same text, known in advance, and any part of it readable alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualroute.data.order.document_stream import HeldLengths
from dualroute.data.order.infill import MARKS, Infill, InfilledLengths, InfilledReader, mark_ids
from dualroute.errors import UserError

PRE, SUF, MID, BOS, EOS = 901, 902, 903, 1, 2
quick = settings(max_examples=60, deadline=None)


def infill(rate: float = 1.0, spm: float = 0.5, seed: int = 0, ends: int = 1) -> Infill:
    return Infill(rate, spm, (PRE, SUF, MID), ends, ends, "data", seed)


def reader(documents: list[list[int]], how: Infill) -> InfilledReader:
    stored = SimpleNamespace(
        read=lambda n, start, count: np.array(documents[n][start : start + count], dtype=np.int64),
        manifest=None,
        split=None,
    )
    rows: Any = [(0, 0, len(ids), 0) for ids in documents]
    return InfilledReader(stored, rows, how)


def text(number: int, length: int, ends: int = 1) -> list[int]:
    body = [100 + number * 50 + place for place in range(length)]
    return [BOS, *body, EOS] if ends else body


def told(ids: list[int], ends: int = 1) -> list[int]:
    """The text that a document in another order was made of."""
    body = ids[ends : len(ids) - ends]
    pre, suf, mid = (body.index(mark) for mark in (PRE, SUF, MID))
    assert pre == 0 < suf < mid
    if suf == 1 and mid > 1:  # SPM, or PSM with an empty prefix, which reads the same
        rest = body[mid + 1 :]
        suffix = body[suf + 1 : mid]
        return rest + suffix
    return body[1:suf] + body[mid + 1 :] + body[suf + 1 : mid]


@quick
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 9),
    st.integers(0, 1),
)
def test_the_text_is_the_same_and_its_length_is_known(
    sizes: list[int], rate: float, spm: float, seed: int, ends: int
) -> None:
    how = infill(rate, spm, seed, ends)
    documents = [text(number, size, ends) for number, size in enumerate(sizes)]
    lengths = InfilledLengths(HeldLengths([len(ids) for ids in documents]), how)
    reads = reader(documents, how)
    known = lengths.blocks(np.array([0]), len(documents))[0].tolist()
    for number, ids in enumerate(documents):
        found = reads.read(number, 0, known[number]).tolist()
        assert len(found) == known[number]
        chosen = len(found) == len(ids) + MARKS
        assert (PRE in found) == chosen
        assert chosen or found == ids
        if chosen:
            assert told(found, ends) == ids[ends : len(ids) - ends]
            assert found[:ends] == ids[:ends]
            assert found[len(found) - ends :] == ids[len(ids) - ends :]
        for start in range(len(found)):  # any part alone
            for count in (1, 3, len(found) - start):
                part = reads.read(number, start, min(count, len(found) - start)).tolist()
                assert part == found[start : start + count]


def test_as_many_as_asked_and_the_same_ones_each_time() -> None:
    documents, lengths = np.arange(20_000), np.full(20_000, 50)
    chosen = infill(0.3).chosen(documents, lengths)
    assert chosen.mean() == pytest.approx(0.3, abs=0.02)
    assert (chosen == infill(0.3).chosen(documents, lengths)).all()
    assert (chosen != infill(0.3, seed=1).chosen(documents, lengths)).any()
    assert not infill(1.0).chosen(documents, np.full(20_000, 4)).any()  # nothing to cut
    first = [infill(1.0, spm=0.25).parts(number, 50) for number in range(2000)]
    spm = sum(parts[1:3] == [PRE, SUF] for parts in first)
    assert spm / 2000 == pytest.approx(0.25, abs=0.04)


def test_the_tokens_that_mark_the_parts() -> None:
    names = [f"<reserved_{number}>" for number in range(4)]
    tokenizer: Any = SimpleNamespace(pieces=lambda: ["a", *names], special_tokens={}, path="t.model")
    with pytest.raises(
        UserError, match=r"t\.model has no tokens for .*fim_tokens '<reserved_0>' '<reserved_1>'"
    ):
        mark_ids(tokenizer, None)
    assert mark_ids(tokenizer, names[1:]) == (2, 3, 4)
    with pytest.raises(UserError, match="has no <nothing>"):
        mark_ids(tokenizer, ["<nothing>", *names[:2]])
    with pytest.raises(UserError, match="three different tokens"):
        mark_ids(tokenizer, [names[0], names[0], names[1]])
    coder: Any = SimpleNamespace(
        pieces=lambda: ["<fim_suffix>", "<fim_middle>", "<fim_prefix>"], special_tokens={}, path="t"
    )
    assert mark_ids(coder, None) == (2, 0, 1)
