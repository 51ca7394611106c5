"""Comparing a checkpoint with its hashes, every byte once, divided over the ranks of a start.

In: the checkpoint that a run is to go on from.  Here: :func:`divided` deals its chunks out: to each rank
the files that it will load, and what nobody loads or all load to whoever has least; each rank hashes its
own, and all are told what was found.  Next: ``training/checkpointing/resume.py`` refuses a damaged one.

A state of 12 bytes a parameter and weights of 2 cost a rank 14 bytes a parameter over the number of ranks.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from pathlib import PurePath

from dualroute.model import tree_hash
from dualroute.model.checkpoint_folder import METADATA, Checkpoint, damages
from dualroute.model.tree_hash import Piece
from dualroute.training.checkpointing.state_layout import StateLayout
from dualroute.training.parallel.agreement import decided_by_rank_zero, place, told_by_all


def first_damage(checkpoint: Checkpoint, *, digests: bool, together: bool) -> str | None:
    """What is wrong with the files of a checkpoint, compared with its metadata, or None.

    Args:
        checkpoint: The same on all ranks.
        digests: Also compare the hashes, not only the sizes.
        together: All ranks ask, and share the work; else this process does all of it.
    """
    if not together:
        return next(damages(checkpoint, digests=digests), None)
    found = decided_by_rank_zero(lambda: next(damages(checkpoint, digests=False), None))
    if found is not None or not digests:
        return found
    rank, ranks = place()
    own = divided(checkpoint, ranks)[rank]
    return next((damage for damage in told_by_all(lambda: next(_damages(own), None)) if damage), None)


def _damages(pieces: list[Piece]) -> Iterator[str]:
    for piece in pieces:
        try:
            if not piece.is_whole():
                yield f"{piece.path} does not match the sha256 in {METADATA} (changed or corrupted)"
        except OSError as error:
            yield f"{piece.path} cannot be read ({error.strerror or error})"


def divided(checkpoint: Checkpoint, ranks: int) -> list[list[Piece]]:
    """For each rank the pieces that it compares; together they are the checkpoint, each once."""
    dealt: list[list[Piece]] = [[] for _ in range(ranks)]
    left: list[Piece] = []
    for name, said in checkpoint.metadata.get("files", {}).items():
        pieces = tree_hash.pieces(checkpoint.folder / name, said)
        reader = _reader(checkpoint, name, ranks)
        (left if reader is None else dealt[reader]).extend(pieces)
    load = [(sum(piece.size for piece in own), rank) for rank, own in enumerate(dealt)]
    heapq.heapify(load)
    for piece in sorted(left, key=lambda piece: (-piece.size, str(piece.path), piece.start)):
        size, rank = heapq.heappop(load)
        dealt[rank].append(piece)
        heapq.heappush(load, (size + piece.size, rank))
    return dealt


def _reader(checkpoint: Checkpoint, name: str, ranks: int) -> int | None:
    """The one rank that loads this file, where partitions are loaded as they were written."""
    match = re.match(r"(?:bf16_)?zero_pp_rank_(\d+)_", PurePath(name).name)
    if match is None or StateLayout.read(checkpoint).ranks != ranks or int(match[1]) >= ranks:
        return None
    return int(match[1])
