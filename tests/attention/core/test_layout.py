"""Documents and padding on the stream: nothing is lost, no block crosses a document."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualroute.attention import Layout
from dualroute.attention.core.layout import LayoutPlan, query_chunks


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, torch.Tensor, torch.Tensor]:
    batch, length, block = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 9))
    numbers = st.lists(st.integers(0, 2), min_size=batch * length, max_size=batch * length)
    segments = torch.tensor(draw(numbers)).view(batch, length).sort(1).values
    mask = torch.tensor(draw(numbers)).view(batch, length) > 0
    return Layout.build(batch, length, block, segments, mask), segments, mask


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_every_token_has_its_slot_and_comes_back(
    given_layout: tuple[Layout, torch.Tensor, torch.Tensor],
) -> None:
    layout, _, mask = given_layout
    tokens = torch.arange(1.0, 1 + mask.numel(), dtype=torch.float64).view(*mask.shape, 1)
    stream = layout.to_stream(tokens)
    assert stream.shape == (layout.stream.num_slots, 1)
    torch.testing.assert_close(layout.from_stream(stream), tokens * mask[..., None])
    if mask.any():
        valid = layout.stream.slot_valid
        assert torch.equal(
            stream[:, 0] != 0, torch.ones(len(stream), dtype=torch.bool) if valid is None else valid
        )
    # A block holds tokens of one document, in order and without holes, from its own place in it on.
    for number, block in enumerate(stream[:, 0].view(-1, layout.block)):
        ids = block[block > 0].long() - 1
        if len(ids) == 0:
            continue
        assert (block[: len(ids)] > 0).all()
        assert layout.documents.flatten()[ids].unique().numel() == 1
        first = int(layout.stream.block_in_document()[number]) * layout.block
        assert layout.positions.flatten()[ids].tolist() == list(range(first, first + len(ids)))


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_documents_are_runs_of_equal_segments(
    given_layout: tuple[Layout, torch.Tensor, torch.Tensor],
) -> None:
    layout, segments, mask = given_layout
    seen: set[int] = set()
    for row in range(len(mask)):
        last, position = None, 0
        for column in mask[row].nonzero()[:, 0].tolist():
            document = int(layout.documents[row, column])
            key = int(segments[row, column])
            if key != last:
                assert document not in seen
                position = 0
            seen.add(document)
            assert int(layout.positions[row, column]) == position
            last, position = key, position + 1
    assert (layout.documents[~mask] == -1).all()


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(0, 5))
def test_a_split_stream_is_the_stream_in_two(
    given_layout: tuple[Layout, torch.Tensor, torch.Tensor], limit: int
) -> None:
    stream = given_layout[0].stream
    short, long = stream.split(limit)
    assert short.num_slots + long.num_slots == stream.num_slots
    assert all(bucket.blocks <= limit for bucket in short.buckets)
    assert all(bucket.blocks > limit for bucket in long.buckets)
    for name in ("block_in_document", "blocks_in_document", "tokens_in_block"):
        parts = torch.cat([getattr(part, name)() for part in (short, long)])
        assert torch.equal(parts, getattr(stream, name)())


def test_gradients_pass_both_ways() -> None:
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    layout = Layout.build(2, 4, 3, attention_mask=mask)
    rows = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.to_stream, (rows,))
    slots = torch.randn(layout.stream.num_slots, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.from_stream, (slots,))


def test_a_plain_batch_is_its_own_stream() -> None:
    rows = torch.randn(2, 8, 3)
    for given_segments in (None, torch.full((2, 8), 7)):
        layout = Layout.build(2, 8, 4, given_segments, torch.ones(2, 8))
        assert layout.slot_token is None
        assert layout.to_stream(rows).data_ptr() == rows.data_ptr()


def test_nothing_but_padding_gives_zeros() -> None:
    layout = Layout.build(2, 5, 4, attention_mask=torch.zeros(2, 5))
    assert layout.stream.num_slots == 4
    assert not layout.to_stream(torch.randn(2, 5, 3)).any()
    assert not layout.from_stream(torch.randn(4, 3)).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 4), "at least 1"),
        ((1, 5, 0), "block 0"),
        ((1, 5, 4, torch.zeros(1, 6)), r"segment_ids has shape \(1, 6\)"),
        ((1, 5, 4, None, torch.zeros(5)), r"attention_mask has shape \(5,\)"),
    ],
)
def test_impossible_batches_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout.build(*arguments)


@given(st.integers(1, 60), st.integers(1, 50), st.integers(1, 500))
def test_query_chunks_cover_all_blocks_within_the_budget(blocks: int, cost: int, budget: int) -> None:
    chunks = list(query_chunks(blocks, cost, budget))
    assert [number for first, last in chunks for number in range(first, last)] == list(range(blocks))
    assert all((last - first) * cost <= budget or last - first == 1 for first, last in chunks)


def test_a_layout_made_ahead_is_the_same_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and parts go with it: nothing is computed from documents, nor asked for, where it arrives."""
    segments = torch.zeros(2, 90, dtype=torch.long)
    segments[0, :50], segments[0, 50:80], segments[1, :] = 1, 2, 1
    layout = LayoutPlan(8, (4, 99)).build(segments)
    expected = Layout.build(2, 90, 8, segments, segments != 0)
    moved = pickle.loads(pickle.dumps(layout)).to("cpu")
    assert torch.equal(moved.positions, expected.positions)
    assert torch.equal(moved.slot_token, expected.slot_token)
    monkeypatch.setattr(torch, "arange", None)
    monkeypatch.setattr(torch.Tensor, "__bool__", None)
    short, long = moved.stream.split(4)
    assert moved.stream.split(99)[0] is moved.stream  # a part that is the whole stays that
    monkeypatch.undo()
    for ours, theirs in zip(
        (moved.stream, short, long), (expected.stream, *expected.stream.split(4)), strict=True
    ):
        assert ours.buckets == theirs.buckets
        for table in ("first_blocks", "block_in_document", "blocks_in_document", "tokens_in_block"):
            assert table in ours._cache or ours.slot_valid is None
            assert torch.equal(getattr(ours, table)(), getattr(theirs, table)())
        assert torch.equal(ours.document_slots(), theirs.document_slots())
    assert moved.to("meta").stream.split(4)[1].first_blocks().device.type == "meta"


def test_ends_of_documents_are_those_of_their_tokens() -> None:
    segments = torch.zeros(1, 40, dtype=torch.long)
    segments[0, :13] = 1  # two blocks, the second of five tokens
    segments[0, 13:] = 2
    stream = Layout.build(1, 40, 8, segments).stream
    assert stream.document_slots().tolist() == [0, 16, 48]
    assert stream.document_slots(tokens_only=True).tolist() == [0, 13, 16, 43, 48]


@pytest.mark.parametrize(("length", "parts"), [(13, 1), (3, 1), (13, 4)])
def test_whole_rows_are_laid_out_as_documents_are(length, parts):
    """By their shape alone, and filled up for ranks that share them."""
    segments = torch.ones(2, length, dtype=torch.long)
    padded = torch.nn.functional.pad(segments, (0, -length % parts))
    ours = LayoutPlan(8, parts=parts).build(segments)
    shape = padded.shape
    theirs = Layout._general(*shape, 8, padded, padded != 0, torch.device("cpu"), None)
    by_shape = Layout.build(*shape, 8) if parts == 1 else ours
    for layout in (ours, by_shape):
        assert layout.stream.buckets == theirs.stream.buckets
        assert torch.equal(layout.stream.slot_valid, theirs.stream.slot_valid)
        for name in ("positions", "documents", "slot_token", "token_slot"):
            assert torch.equal(getattr(layout, name), getattr(theirs, name)), name
