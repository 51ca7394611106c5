"""Which tokens read a block: the (token, block) pairs of a piece of the stream, sorted by block.

In: selected (H_kv, S, C) as `select_blocks` gives it, C = 1 + top_k, -1 = none. Out: a `PairList`, whose
sorted pairs are cut into programs of at most CHUNK pairs that all read one block; a program is what one
thread block of a kernel works on.

The host never learns how many programs there are, for asking would stop it until the
GPU is done. It launches as many as there could be, and the surplus ones see a block number that does not
exist and leave.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 256  # pairs per program: a block that everybody reads, such as the sink, is shared by many programs
MAX_PAIR_ROWS = 1 << 22  # (pair, query head) rows worked on at once: bounds the memory of partial results
BLOCKS_LIKE_A_ROW = 512  # their bits of a slot count like a row: 64 bytes


class Piece(NamedTuple):
    """Key heads first_head..last_head-1 and slots first_slot..last_slot-1 of a stream."""

    first_head: int
    last_head: int
    first_slot: int
    last_slot: int

    @property
    def heads(self) -> int:
        return self.last_head - self.first_head

    @property
    def slots(self) -> int:
        return self.last_slot - self.first_slot


class PairList(NamedTuple):
    """Pairs of a piece, numbered (head * slots + slot) * C + column inside it; buckets are head * nb + block.

    pairs: (P,) int32, sorted by bucket, pairs of -1 last.
    pair_start: (buckets + 1,) int32, where each bucket begins in `pairs`.
    program_bucket: (programs,) int32, = buckets for surplus programs.
    program_start: (buckets + 1,) int32, the first program of each bucket.
    """

    pairs: Tensor
    pair_start: Tensor
    program_bucket: Tensor
    program_start: Tensor

    @property
    def buckets(self) -> int:
        return len(self.pair_start) - 1

    @property
    def programs(self) -> int:
        return len(self.program_bucket)


def pieces(kv_heads: int, group: int, slots: int, columns: int, num_blocks: int) -> Iterator[Piece]:
    """Cover all heads and slots with pieces of at most MAX_PAIR_ROWS rows: whole heads, or a part of one.

    Whole heads come first, since the lists of a part of the stream are short and fill their tiles badly. Of
    very long texts the bits of `far.open_bits`, one per slot and block, set the limit: 256 MiB.
    """
    width = max(columns * group, num_blocks // BLOCKS_LIKE_A_ROW)
    heads = max(1, MAX_PAIR_ROWS // (slots * width))
    step = slots if slots * width <= MAX_PAIR_ROWS else max(1, MAX_PAIR_ROWS // width)
    for head in range(0, kv_heads, heads):
        for slot in range(0, slots, step):
            yield Piece(head, min(head + heads, kv_heads), slot, min(slot + step, slots))


def pair_list(selected: Tensor, piece: Piece, num_blocks: int) -> PairList:
    """Sort the pairs of a piece of selected (H_kv, S, C): histogram and prefix sum, nothing read back."""
    chosen = selected[piece.first_head : piece.last_head, piece.first_slot : piece.last_slot]
    device = selected.device
    buckets = piece.heads * num_blocks
    offset = num_blocks * torch.arange(piece.heads, device=device, dtype=torch.int32)[:, None, None]
    bucket = torch.where(chosen < 0, buckets, chosen + offset).flatten()  # (P,)
    ordered, pairs = torch.sort(bucket, stable=True)  # stable: the order of summation never changes
    # (buckets + 1,): a search in the sorted list is a histogram and its prefix sum in one
    pair_start = torch.searchsorted(ordered, torch.arange(buckets + 1, device=device, dtype=torch.int32))

    programs = (pair_start.diff() + CHUNK - 1) // CHUNK  # (buckets,)
    program_end = programs.cumsum(0)
    at_most = len(bucket) // CHUNK + min(buckets, len(bucket))  # one full or last chunk each
    number = torch.arange(at_most, device=device)
    return PairList(
        pairs.to(torch.int32),
        pair_start.to(torch.int32),
        torch.searchsorted(program_end, number, right=True).to(torch.int32),
        torch.nn.functional.pad(program_end, (1, 0)).to(torch.int32),
    )
