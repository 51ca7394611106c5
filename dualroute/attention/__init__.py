"""DualRouting attention: the mathematics and its algorithm; torch and nothing else. Read in this order:

    reference.py          the formulas, literally and slowly: the specification of every fast path
    layer.py              DualRouting, the layer: projections, rotary embedding, both routes, gate, output
    core/                 what every back end shares: layout, rotary embedding, caches, block statistics
    backends/torch/       the routes in plain torch
    backends/cpp/         the same routes in C++, for CPUs
    backends/flash/       the same routes through flash attention's operators, for GPUs
    backends/triton/      the same routes in Triton, for GPUs
    backend.py            which of them runs
    verification/         which of them are right on a device, and the fastest of those
    compiled.py           the routes as operators of a compiled graph
    statistics.py         what the router does, in numbers for a monitor
    sequence_parallel.py  ranks that share one long text

Shapes: B rows, n tokens, H heads, H_kv key heads, d head_dim, S slots of the stream, nb blocks.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualroute.attention.core.cache import LayerCache
    from dualroute.attention.core.layout import Layout, Stream
    from dualroute.attention.core.options import AUTO_BREAK_EVEN, FAR_SUMMARIES, GLOBAL_MODES, ROUTERS
    from dualroute.attention.core.routing import Routing
    from dualroute.attention.layer import DualRouting
    from dualroute.attention.routes import (
        full_attention,
        global_attention,
        local_attention,
        routed_attention,
        select_blocks,
    )

#: Imported when they are first used: `core.options` alone needs no torch.
_HOMES = {
    "AUTO_BREAK_EVEN": "core.options",
    "FAR_SUMMARIES": "core.options",
    "GLOBAL_MODES": "core.options",
    "ROUTERS": "core.options",
    "DualRouting": "layer",
    "LayerCache": "core.cache",
    "Layout": "core.layout",
    "Routing": "core.routing",
    "Stream": "core.layout",
    "full_attention": "routes",
    "global_attention": "routes",
    "local_attention": "routes",
    "routed_attention": "routes",
    "select_blocks": "routes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


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
