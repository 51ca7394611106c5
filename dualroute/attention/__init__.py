"""DualRouting attention: the mathematics and its algorithm; torch and nothing else. Read in this order:

    reference.py          the formulas, literally and slowly: the specification of every fast path
    dual_routing.py       DualRouting, the layer: projections, rotary embedding, both routes, gate, output
    layout.py             Layout and Stream: documents and padding of a batch, computed once for all layers
    local_route.py        sliding window, O(n * window)
    global_route.py       full attention, and which documents are routed instead
    routed.py             own block + sink + chosen blocks + far summary in one softmax, forward and backward
    router.py             which blocks a token reads: minmax, moment, mean
    selected.py           these blocks, exactly
    sink.py               the first block of a document, exactly
    far_summary.py        the blocks that a token does not read, one pseudo-key each
    dispatch.py           (token, block) pairs sorted into tiles
    kernels.py            attention over tiles with its log-sum-exp; the only user of a private torch operator
    backend.py            which kernels run: plain torch, or the same routes in cpu_kernels/ (C++) and
                          triton_kernels/ (GPUs)
    cache.py, decode.py   token by token: what is kept, what a step reads
    statistics.py         what the router does, in numbers for a monitor
    rope.py, options.py   rotary position embedding; defaults and errors of the layer's options

Shapes: B rows, n tokens, H heads, H_kv key heads, d head_dim, S slots of the stream, nb blocks.
"""

from __future__ import annotations

from dualroute.attention.cache import LayerCache
from dualroute.attention.dual_routing import DualRouting
from dualroute.attention.far_summary import FAR_SUMMARIES
from dualroute.attention.global_route import AUTO_BREAK_EVEN, GLOBAL_MODES, full_attention, global_attention
from dualroute.attention.layout import Layout, Stream
from dualroute.attention.local_route import local_attention
from dualroute.attention.routed import Routing, routed_attention
from dualroute.attention.router import ROUTERS, select_blocks

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
