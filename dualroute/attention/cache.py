"""What decoding keeps: a ring of `window` keys for local heads, all keys and block statistics for global.

In: keys and values of new tokens, (R, m, d) with R = batch * kv_heads, in the order of the text; every row
of the batch has the same length. Out: the tensors that `decode` reads.

The surprising fact: a block's statistics are written once, when its last token arrives, and never touched
again. So a step costs what it reads, top_k + 2 blocks and one pseudo-key per past block, and not the length
of the text.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.attention.far_summary import far_keys
from dualroute.attention.router import block_features


class GlobalCache:
    """Keys and values of a global route, and of each complete block the router's features and far summary.

    There is room for `capacity` tokens at first; more is made when they come, twice as much each time.
    """

    def __init__(
        self,
        rows: int,
        capacity: int,
        head_dim: int,
        block: int,
        router: str,
        sub_block: int,
        far_summary: str,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        blocks = -(-capacity // block)
        self.length, self.block = 0, block
        self.router, self.sub_block, self.far_summary = router, sub_block, far_summary

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(rows, *shape, device=device, dtype=dtype)

        parts = block // sub_block if router == "minmax" else 1
        width = head_dim if router == "mean" else 2 * head_dim
        self.keys, self.values = zeros(blocks * block, head_dim), zeros(blocks * block, head_dim)
        self.features = zeros(blocks, parts, width)
        self.far_keys: Tensor | None = None
        self.far_values: Tensor | None = None
        if far_summary != "none":
            self.far_keys = zeros(blocks, (2 if far_summary == "second_order" else 1) * head_dim)
            self.far_values = zeros(blocks, head_dim)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add (R, m, d) keys and values, and the statistics of every block they complete."""
        begin, end = self.length, self.length + keys.shape[1]
        if end > self.keys.shape[1]:
            self._grow(end)
        self.keys[:, begin:end], self.values[:, begin:end] = keys, values
        self.length = end
        first, last = begin // self.block, end // self.block  # blocks that became complete
        if first == last:
            return
        tokens = slice(first * self.block, last * self.block)
        blocks = self.keys[:, tokens].unflatten(1, (-1, self.block))
        self.features[:, first:last] = block_features(blocks, self.router, self.sub_block)
        if self.far_keys is not None and self.far_values is not None:
            self.far_keys[:, first:last] = far_keys(blocks, self.far_summary)
            self.far_values[:, first:last] = self.values[:, tokens].unflatten(1, (-1, self.block)).mean(2)

    def _grow(self, length: int) -> None:
        blocks = self.features.shape[1]
        more = max(-(-length // self.block), 2 * blocks) - blocks
        for name, rows in _tensors(self):  # (R, tokens, ...) or (R, blocks, ...)
            added = more * (rows.shape[1] // blocks)
            setattr(self, name, F.pad(rows, (*(0, 0) * (rows.ndim - 2), 0, added)))


class LocalCache:
    """The last `window` keys and values of a local route; the token at position p lies in slot p % window."""

    def __init__(
        self, rows: int, window: int, head_dim: int, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        self.length, self.window = 0, window
        self.keys = torch.zeros(rows, window, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)

    def last(self, count: int) -> tuple[Tensor, Tensor]:
        """The last `count` keys and values in the order of the text; count <= min(length, window)."""
        places = torch.arange(self.length - count, self.length, device=self.keys.device) % self.window
        return self.keys.index_select(1, places), self.values.index_select(1, places)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add (R, m, d) keys and values, dropping what leaves the window."""
        count = keys.shape[1]
        kept = min(count, self.window)
        places = (
            torch.arange(self.length + count - kept, self.length + count, device=keys.device) % self.window
        )
        self.keys.index_copy_(1, places, keys[:, count - kept :].to(self.keys.dtype))
        self.values.index_copy_(1, places, values[:, count - kept :].to(self.values.dtype))
        self.length += count


class LayerCache:
    """The cache of one DualRouting layer; `length` tokens are in it, `max_length` fit.

    `exact` says that the global route reads everything: decided once, from max_length, so that a text does
    not change its attention half-way when it grows past a limit (see DualRouting, global_mode="auto").
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        exact: bool,
        global_cache: GlobalCache | None,
        local_cache: LocalCache | None,
    ) -> None:
        self.batch_size, self.max_length, self.exact = batch_size, max_length, exact
        self.global_cache, self.local_cache = global_cache, local_cache

    @property
    def length(self) -> int:
        either = self.global_cache or self.local_cache
        return either.length if either is not None else 0

    def select(self, texts: Tensor) -> None:
        """Go on with the texts (B',) of the batch only, in that order, as a beam search does."""
        for part in (self.global_cache, self.local_cache):
            for name, rows in _tensors(part):  # (R, ...) with R = batch * kv_heads
                of_text = rows.unflatten(0, (self.batch_size, -1))
                setattr(part, name, of_text.index_select(0, texts.to(rows.device)).flatten(0, 1))
        self.batch_size = len(texts)


def _tensors(cache: GlobalCache | LocalCache | None) -> list[tuple[str, Tensor]]:
    """All that a cache stores, by attribute; nothing for None."""
    stored = {} if cache is None else vars(cache)
    return [(name, value) for name, value in stored.items() if isinstance(value, Tensor)]
