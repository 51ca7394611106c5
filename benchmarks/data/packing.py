"""What best-fit packing leaves empty, and how fast windows are found.

    python benchmarks/data/packing.py

Lengths are lognormal (sigma 1) with a fixed seed; no file is read.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from dualroute.data.order.document_stream import DocumentStream
from dualroute.data.order.packing import PackedRows, use_of

DOCUMENTS, WINDOWS = 200_000, 2_000


def main() -> None:
    """Print the table of docs/data.md."""
    print("| median | context | padding | documents/s | again, ms | windows/s |\n|---|---|---|---|---|---|")
    for median, context in ((60, 2048), (500, 2048), (3000, 2048), (800, 8192)):
        draw = np.random.default_rng(0)
        lengths = np.maximum(draw.lognormal(np.log(median), 1, DOCUMENTS).astype(np.int64), 2)
        with tempfile.TemporaryDirectory() as folder:
            starts = []
            for _ in range(2):
                order = (DocumentStream(lengths), "benchmark", 0, context, 8)
                plan = PackedRows(*order, "best_fit", Path(folder) / ".packing")
                began = time.perf_counter()
                windows = plan.windows_per_epoch
                starts.append(time.perf_counter() - began)
        start, again = starts
        padding = use_of(plan.stream, context, "best_fit", windows).padding
        ids = plan.ids(np.arange(WINDOWS)).tolist()
        began = time.perf_counter()
        for sample in ids:
            plan.pieces(sample)
        found = time.perf_counter() - began
        print(
            f"| {median} | {context:,} | {padding:.1%} | {DOCUMENTS / start:,.0f} | {again * 1e3:.1f} "
            f"| {WINDOWS / found:,.0f} |"
        )
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")


if __name__ == "__main__":
    main()
