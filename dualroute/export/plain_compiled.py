"""Routes as operators of a compiled graph: none.

Stands in for :mod:`dualroute.attention.compiled` in an exported folder, where `torch.compile` breaks its
graph at the routes.  An operator's name may be registered once in a process, and several folders may be
loaded in one.
"""

from __future__ import annotations

from dualroute.attention.core.layout import Layout
from dualroute.attention.routes import global_attention as global_attention
from dualroute.attention.routes import local_attention as local_attention

lay_out_in_graph = Layout.of_batch


def tracing() -> bool:
    """The layer always runs its own code."""
    return False
