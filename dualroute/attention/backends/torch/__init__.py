"""Plain torch: the routes on every device, in every type, in both directions.

    select.py           which blocks a token reads
    routed.py           own block + sink + chosen blocks + far blocks in one softmax, forward and backward
    sink.py             the first block of a document, exactly
    selected.py         the chosen blocks, exactly
    dispatch.py         (token, block) pairs sorted into tiles, for `selected`
    far.py              the blocks that a token does not read, one pseudo-key each
    tile_attention.py   attention over tiles with its log-sum-exp; the only user of a private torch operator
    device.py           how much at once, by device
    full.py             the whole document
    local.py            a sliding window
    local_grid.py       a square around each patch of an image
    decode.py           new tokens against a cache
    static_decode.py    one new token, in shapes that never change

The other back ends fall back to it.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from dualroute.attention.backends.torch.decode import decode_step
from dualroute.attention.backends.torch.full import full_attention
from dualroute.attention.backends.torch.local import local_attention
from dualroute.attention.backends.torch.routed import routed_attention
from dualroute.attention.backends.torch.select import select_blocks
from dualroute.attention.core.clusters import similar_order
from dualroute.attention.core.layout import Stream


class TorchBackend:
    """See `dualroute.attention.backend.Backend`."""

    tokens: ModuleType | None = None
    takes_copies = True
    similar_order = staticmethod(similar_order)

    def description(self) -> str:
        return "plain torch"

    def supports(self, query: Tensor, *, causal: bool = True, block: int | None = None) -> bool:
        return True

    def why_not(self, query: Tensor, *, causal: bool = True, block: int | None = None) -> str | None:
        if self.supports(query, causal=causal, block=block):
            return None
        kind = str(query.dtype).removeprefix("torch.")
        route = "the local route" if block is None else f"block {block}"
        asked = f"{route} of {kind}, head_dim {query.shape[-1]}, causal={causal}, on {query.device.type}"
        return f"{self.description()}: not {asked}"

    select_blocks = staticmethod(select_blocks)
    routed_attention = staticmethod(routed_attention)
    local_attention = staticmethod(local_attention)
    decode_step = staticmethod(decode_step)

    def full_attention(
        self, query: Tensor, key: Tensor, value: Tensor, stream: Stream, *, causal: bool = True
    ) -> Tensor:
        return full_attention(query, key, value, stream, causal=causal)
