"""Sorted lists: every pair exactly once, under its block, and every program within one block."""

from __future__ import annotations

import pytest
import torch

from dualroute.attention.backends.triton import pair_lists
from dualroute.attention.backends.triton.pair_lists import Piece, pair_list, pieces


@pytest.mark.parametrize("chunk", [1, 4, 256])
@pytest.mark.parametrize("piece", [Piece(0, 2, 0, 12), Piece(1, 2, 5, 12), Piece(0, 1, 0, 1)])
def test_every_pair_is_in_a_program_of_its_block(
    piece: Piece, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_lists, "CHUNK", chunk)
    num_blocks = 5
    selected = torch.randint(-1, num_blocks, (2, 12, 3), generator=torch.Generator().manual_seed(0))
    chosen = selected[piece.first_head : piece.last_head, piece.first_slot : piece.last_slot].flatten()
    listed = pair_list(selected.to(torch.int32), piece, num_blocks)
    found = []
    for program, bucket in enumerate(listed.program_bucket.tolist()):
        if bucket == listed.buckets:
            continue
        begin = listed.pair_start[bucket] + (program - listed.program_start[bucket]) * chunk
        end = min(int(begin) + chunk, int(listed.pair_start[bucket + 1]))
        assert begin < end
        for pair in listed.pairs[begin:end].tolist():
            assert chosen[pair] == bucket % num_blocks
            assert pair // (3 * piece.slots) == bucket // num_blocks
            found.append(pair)
    assert sorted(found) == (chosen >= 0).nonzero()[:, 0].tolist()


def test_nothing_selected_is_no_program() -> None:
    listed = pair_list(torch.full((1, 4, 2), -1, dtype=torch.int32), Piece(0, 1, 0, 4), 2)
    assert (listed.program_bucket == listed.buckets).all()


@pytest.mark.parametrize(("num_blocks", "width"), [(5, 8), (20 * pair_lists.BLOCKS_LIKE_A_ROW, 20)])
@pytest.mark.parametrize("rows", [1, 30, 100, 1 << 22])
def test_pieces_cover_everything_once(
    rows: int, num_blocks: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the pairs of a slot set the limit, or its bits."""
    monkeypatch.setattr(pair_lists, "MAX_PAIR_ROWS", rows)
    seen = torch.zeros(3, 10, dtype=torch.int32)
    for piece in pieces(3, 2, 10, 4, num_blocks):
        seen[piece.first_head : piece.last_head, piece.first_slot : piece.last_slot] += 1
        assert piece.heads * piece.slots * width <= max(rows, width)
    assert (seen == 1).all()
