"""What a process holds of an index: so little that 10^9 documents fit into a node of many ranks."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dualroute.data.index import IndexRows, map_index, write_header
from dualroute.data.order.document_stream import DocumentStream
from dualroute.data.plan import BatchPlan
from dualroute.data.reader import IndexedLengths

RANKS = 32  # of a node, each with an index of its own; loaders' processes share theirs
GIB = 1 << 30


def write_rows(path: Path, documents: int) -> IndexRows:
    """An index of documents of 1 to 1000 tokens in one shard."""
    draw = np.random.default_rng(0)
    with open(path, "wb") as stream:
        write_header(stream, documents)
        offset = stream.tell()
        place = 0
        for _ in range(0, documents, 100_000):
            rows = np.zeros((100_000, 4), dtype="<i8")
            rows[:, 2] = draw.integers(1, 1001, 100_000)
            rows[:, 1] = place + 2 * np.cumsum(rows[:, 2])
            place = int(rows[-1, 1])
            stream.write(rows.tobytes())
    return IndexRows(path, offset, documents, "make it again")


@pytest.fixture(scope="module")
def indices(tmp_path_factory: pytest.TempPathFactory) -> dict[int, IndexRows]:
    folder = tmp_path_factory.mktemp("index")
    return {count: write_rows(folder / f"{count}.npy", count) for count in (200_000, 1_000_000)}


def peak(rows: IndexRows) -> int:
    """Bytes at most while a plan is made and asked."""
    tracemalloc.start()
    try:
        map_index(rows.path, rows.documents, "make it again")
        plan = BatchPlan(DocumentStream(IndexedLengths(rows)), "f", 0, 512, 64)
        for step in range(3):
            batch = plan.batch(step * 64)
            plan.num_targets(batch)
            for sample in batch[:4]:
                plan.pieces(int(sample))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_node_holds_less_than_one_gib_for_a_billion_documents(indices: dict[int, IndexRows]) -> None:
    few, many = (peak(rows) for rows in indices.values())
    each = (many - few) / 800_000  # bytes a document and process, at the worst moment
    assert 0 < each < 0.2
    held = DocumentStream(IndexedLengths(indices[1_000_000]))._marks.nbytes
    assert RANKS * (held / 1e6) * 1e9 <= GIB  # what stays
    assert few < 40e6  # parts of the index, whatever its length
