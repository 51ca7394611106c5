"""Positions of the stream, its pieces and its targets are those of the documents, token by token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualroute.data.order.document_stream import DocumentStream

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)
quick = settings(max_examples=60, deadline=None)


def labelled(lengths: list[int]) -> np.ndarray:
    """(tokens,) bool: has this token a next one in its document?  The definition, token by token."""
    return np.concatenate([np.arange(n) < n - 1 for n in lengths])


class TestDocumentStream:
    @quick
    @given(lengths=LENGTHS, data=st.data())
    def test_pieces_are_the_tokens(self, lengths: list[int], data: st.DataObject) -> None:
        stream = DocumentStream(lengths)
        start = data.draw(st.integers(0, sum(lengths) - 1))
        stop = data.draw(st.integers(start + 1, sum(lengths)))
        tokens = [(k, j) for k, n in enumerate(lengths) for j in range(n)][start:stop]
        pieces = stream.pieces(start, stop).tolist()
        assert [(k, j) for k, first, count, _ in pieces for j in range(first, first + count)] == tokens
        assert [targets for *_, targets in pieces] == [
            sum(j < lengths[k] - 1 for _, j in part)
            for k, part in itertools.groupby(tokens, lambda token: token[0])
        ]
        before = stream.targets_before([start, stop])
        assert before[1] - before[0] == labelled(lengths)[start:stop].sum()

    def test_refuses_a_document_without_tokens(self) -> None:
        with pytest.raises(ValueError, match="document 1 has 0 tokens"):
            DocumentStream([3, 0, 2])


class TestManyDocuments:
    """More documents than lie between two cumulative lengths that are held."""

    @quick
    @given(st.integers(1, 700), st.integers(0, 2**32 - 1))
    def test_finds_what_the_cumulative_lengths_say(self, documents: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        lengths = draw.integers(1, 6, documents)
        ends = np.cumsum(lengths)
        stream = DocumentStream(lengths)
        assert stream.tokens == ends[-1]
        everywhere = np.arange(stream.tokens + 1)
        assert np.array_equal(
            stream.ended_before(everywhere), np.searchsorted(ends, everywhere, side="right")
        )
        start = int(draw.integers(stream.tokens))
        stop = int(draw.integers(start, stream.tokens)) + 1
        number = np.repeat(np.arange(documents), lengths)[start:stop]
        offset = (everywhere[:-1] - np.repeat(ends - lengths, lengths))[start:stop]
        pieces = stream.pieces(start, stop)
        assert pieces[:, 0].tolist() == np.unique(number).tolist()
        assert pieces[:, 1].tolist() == [int(offset[number == k].min()) for k in np.unique(number)]
        assert pieces[:, 2].tolist() == [int((number == k).sum()) for k in np.unique(number)]
        goes_on = offset < lengths[number] - 1
        assert pieces[:, 3].tolist() == [int(goes_on[number == k].sum()) for k in np.unique(number)]

    def test_names_the_document_without_tokens(self) -> None:
        lengths = [1] * 300_000
        lengths[299_999] = 0
        with pytest.raises(ValueError, match="document 299999 has 0 tokens"):
            DocumentStream(lengths)
