"""DualRouting attention: the mathematics and its algorithm; torch and nothing else. Read in this order:

    reference.py          the formulas, literally and slowly: the specification of every fast path
    layer.py              DualRouting, the layer: projections, rotary embedding, both routes, gate, output
    core/                 what every back end shares: layout, rotary embedding, caches, block statistics
    backends/torch/       the routes in plain torch
    backends/cpp/         the same routes in C++, for CPUs
    backends/triton/      the same routes in Triton, for GPUs
    backend.py            which of them runs
    statistics.py         what the router does, in numbers for a monitor
    sequence_parallel.py  ranks that share one long text

Shapes: B rows, n tokens, H heads, H_kv key heads, d head_dim, S slots of the stream, nb blocks.
"""

from __future__ import annotations

from dualroute.attention.backends.torch.full import (
    AUTO_BREAK_EVEN,
    GLOBAL_MODES,
    full_attention,
    global_attention,
)
from dualroute.attention.backends.torch.local import local_attention
from dualroute.attention.backends.torch.routed import Routing, routed_attention
from dualroute.attention.core.cache import LayerCache
from dualroute.attention.core.far_summary import FAR_SUMMARIES
from dualroute.attention.core.layout import Layout, Stream
from dualroute.attention.core.router import ROUTERS, select_blocks
from dualroute.attention.layer import DualRouting

__all__ = [
    "AUTO_BREAK_EVEN",
    "FAR_SUMMARIES",
    "GLOBAL_MODES",
    "ROUTERS",
    "DualRouting",
    "LayerCache",
    "Layout",
    "Routing",
    "Stream",
    "full_attention",
    "global_attention",
    "local_attention",
    "routed_attention",
    "select_blocks",
]
