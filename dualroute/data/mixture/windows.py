"""Windows of a mixture: each is read where it lies.

In: requests by ids of `dualroute.data.mixture.plan`. Out: the windows of the sources' own datasets, for
`collate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dualroute.data.mixture.plan import split_ids
from dualroute.data.plan import Request


class MixtureWindows(Dataset[dict[str, Any]]):
    """Map-style: request → window of the source that its id names.

    Args:
        parts: the windows of each source.
        tell_source: add ``source``, 0-dim int64: the number of the source, -1 for an empty window.
    """

    def __init__(self, parts: Sequence[Dataset[Any]], tell_source: bool = False) -> None:
        self.parts, self.tell_source = parts, tell_source

    def __getitem__(self, request: Request | int) -> dict[str, Any]:
        sample = request.sample if isinstance(request, Request) else request
        sources, ids = split_ids(sample)
        source, own = int(sources), int(ids)
        window = self.parts[max(source, 0)][
            Request(own, request.num_targets) if isinstance(request, Request) else own
        ]
        return {**window, "source": np.array(source, dtype=np.int64)} if self.tell_source else window
