"""What decoding keeps: a ring of `window` keys for local heads, all keys and block statistics for global.

In: keys and values of new tokens, (R, m, d) with R = batch * kv_heads, in the order of the text; every row
of the batch has the same length. Out: the tensors that `decode` reads.

A block's statistics are written once, when its last token arrives. So a step costs what it
reads, top_k + 2 blocks and one pseudo-key per past block, and not the length of the text. With blocks of
similar keys (`core.clusters`) what is past is put in another order where it lies, between two steps: kernels
see blocks as ever.

`core.storage` has a global cache whose complete blocks are integers of 8 or 4 bits, and a place for them on
the disk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dualroute.attention.core.clusters import cell_size, similar_order, span_sizes
from dualroute.attention.core.far_summary import far_keys
from dualroute.attention.core.precision import accumulation_dtype, outside_inference_mode
from dualroute.attention.core.router import block_features
from dualroute.attention.core.routing import SharedChoice
from dualroute.attention.core.storage.paging import Pages

Place = slice | Tensor  # tokens: a slice, or their numbers


class KeysAndValues:
    """Storage of (R, n, d) keys and values."""

    #: tensors with a row for each token
    OF_TOKENS: tuple[str, ...] = ("keys", "values")
    #: tensors with a row for each block
    OF_BLOCKS: tuple[str, ...] = ()
    #: tensors whose size does not depend on the text's
    OF_TEXTS: tuple[str, ...] = ()
    length = 0

    def __init__(
        self, rows: int, tokens: int, head_dim: int, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        self.keys = torch.zeros(rows, tokens, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)

    def write(self, place: Place, keys: Tensor, values: Tensor) -> None:
        """Put (R, m, d) keys and values at m tokens."""
        put(self.keys, place, keys)
        put(self.values, place, values)

    def advance(self) -> None:
        """One token more was written."""
        self.length += 1

    @outside_inference_mode
    def select(self, rows: Tensor) -> None:
        """Go on with the rows (R',) only, in that order; a row may come twice."""
        for name in (*self.OF_TOKENS, *self.OF_BLOCKS, *self.OF_TEXTS):
            part = getattr(self, name)
            if part is not None:
                setattr(self, name, part.index_select(0, rows))


def put(rows: Tensor, place: Place, new: Tensor) -> None:
    """Write new (R, m, ...) at m places of rows (R, n, ...)."""
    if isinstance(place, slice):
        rows[:, place] = new
    else:
        rows.index_copy_(1, place.to(rows.device), new.to(rows.device, rows.dtype))


class GlobalCache(KeysAndValues):
    """Keys and values of a global route, and of each complete block the router's features and far summary.

    There is room for `capacity` tokens at first; more is made when they come, twice as much each time.
    """

    OF_TOKENS: tuple[str, ...] = (*KeysAndValues.OF_TOKENS, "places")
    OF_BLOCKS: tuple[str, ...] = ("features", "far_keys", "far_values")
    #: bits of a stored number, None for floats
    bits: int | None = None
    #: where the tensors of tokens lie, None where the others do
    pages: Pages | None = None
    #: what several layers' caches of a text share (see `decoding.share_choices`), and whether another chose
    choice: SharedChoice | None = None
    follows = False

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
        statistics_dtype: torch.dtype | None = None,
        cluster_span: int = 0,
    ) -> None:
        blocks = -(-capacity // block)
        super().__init__(rows, blocks * block, head_dim, device, dtype)
        if statistics_dtype is None:
            statistics_dtype = dtype
        if statistics_dtype == torch.float16:  # too narrow for squares
            statistics_dtype = torch.float32
        self.block = block
        self.router, self.sub_block, self.far_summary = router, sub_block, far_summary
        self.cluster_span, self.regrouped = cluster_span, 0
        #: (R, tokens) int32, with blocks of similar keys: where in the text the token in each place stands
        self.places: Tensor | None = None
        if cluster_span:
            places = torch.arange(blocks * block, dtype=torch.int32, device=device)
            self.places = places.repeat(rows, 1)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(rows, *shape, device=device, dtype=statistics_dtype)

        parts = block // sub_block if router == "minmax" else 1
        width = head_dim if router == "mean" else 2 * head_dim
        self.features = zeros(blocks, parts, width)
        self.far_keys: Tensor | None = None
        self.far_values: Tensor | None = None
        if far_summary != "none":
            self.far_keys = zeros(blocks, (2 if far_summary == "second_order" else 1) * head_dim)
            self.far_values = zeros(blocks, head_dim)

    @property
    def cache_dtype(self) -> str:
        """How complete blocks are kept, as `decoding.new_cache` calls it."""
        return "auto" if self.bits is None else f"int{self.bits}"

    def offload(self, pages: Pages, length: int) -> None:
        """Make room for `length` tokens at most, in `pages` for tensors of tokens; there was none before."""
        self.pages = pages
        self._grow(length)
        blocks = -(-length // self.block)
        for name in self.OF_TOKENS:
            none = getattr(self, name)
            if none is None:
                continue
            shape = torch.Size((len(none), blocks * self.block, *none.shape[2:]))
            setattr(self, name, pages.zeros(shape, none.dtype))
        if self.places is not None:
            self.places[:] = torch.arange(blocks * self.block, dtype=torch.int32)

    def advance(self) -> None:
        super().advance()
        if self.pages is not None:
            self.pages.release()

    def select(self, rows: Tensor) -> None:
        if self.pages is not None:
            raise ValueError("a cache with cache_offload cannot be put in another order: leave that out")
        super().select(rows)

    @property
    def own(self) -> int:
        """The block that the newest token lies in."""
        return (self.length - 1) // self.block

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add (R, m, d) keys and values, and the statistics of every block they complete."""
        begin, end = self.length, self.length + keys.shape[1]
        self.reserve(end)
        self.write(slice(begin, end), keys, values)
        self.length = end
        first, last = begin // self.block, end // self.block  # blocks that became complete
        if first < last:
            tokens = slice(first * self.block, last * self.block)
            blocks, of_values = (rows[:, tokens].unflatten(1, (-1, self.block)) for rows in self._rows())
            self._summarise(slice(first, last), blocks, of_values)
            if self.pages is not None:
                self.pages.release()

    def put_token(self, key: Tensor, value: Tensor, position: Tensor, *, statistics: bool) -> None:
        """`append` of one token (R, d) at a position (), with shapes that never change; `length` stays.

        The statistics of its block are written with what the block holds so far, wrong until its last token:
        nobody sees them before. Without `statistics` they are left out.
        """
        self.write(position.view(1), key[:, None], value[:, None])
        if statistics:
            own = (position // self.block).view(1)
            in_blocks = (rows.unflatten(1, (-1, self.block)) for rows in self._rows())
            self._summarise(own, *(rows.index_select(1, own.to(rows.device)) for rows in in_blocks))

    def _rows(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def _summarise(self, place: Place, keys: Tensor, values: Tensor) -> None:
        """Write the statistics of blocks, whose keys and values are (R, n, block, d)."""
        wide, device = accumulation_dtype(self.features.dtype), self.features.device
        keys, values = keys.to(device, wide), values.to(device, wide)
        put(self.features, place, block_features(keys, self.router, self.sub_block))
        self._summarise_far(place, keys, values)

    def _summarise_far(self, place: Place, keys: Tensor, values: Tensor) -> None:
        if self.far_keys is not None and self.far_values is not None:
            put(self.far_keys, place, far_keys(keys, self.far_summary))
            put(self.far_values, place, values.mean(2))

    def router_features(self, first: int, last: int) -> Tensor:
        """Features (R, last - first, parts, f) of blocks."""
        return self.features[:, first:last]

    def read_first(self, count: int, own: int | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values (R, count, d) of the first tokens, `own` being the block of the newest one."""
        device = self.features.device
        return self.keys[:, :count].to(device, dtype), self.values[:, :count].to(device, dtype)

    def read_blocks(self, numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values (R, k * block, d) of blocks (R, k), the last of which is the newest token's own."""
        return self._picked(self.keys, numbers).to(dtype), self._picked(self.values, numbers).to(dtype)

    def _picked(self, stored: Tensor, numbers: Tensor) -> Tensor:
        """Rows (R, n, ...) of tokens -> those of the blocks (R, k), (R, k * block, ...)."""
        row = torch.arange(len(numbers), device=stored.device)[:, None]
        blocks = stored.unflatten(1, (-1, self.block))[row, numbers.to(stored.device)]
        return blocks.flatten(1, 2).to(numbers.device)

    def regroup(self) -> None:
        """Bring blocks of similar keys up to date, before a token is appended: what that token has behind it
        is read in this order. Only as much is moved as has become past since.

        `regrouped` blocks behind the first one have been done, the spans of a size together with those of
        which they consist.
        """
        done, past = self.regrouped, max(0, self.length // self.block - 1)
        if not self.cluster_span or done == past:
            return
        cell, place = cell_size(self.router, self.block, self.sub_block), 0
        for size in span_sizes(self.cluster_span // self.block):
            while place + size <= past:
                if place + size > done:
                    self._regroup(1 + place, size, cell)
                place += size
        self.regrouped = past

    def _regroup(self, first: int, count: int, cell: int) -> None:
        """Put similar keys of `count` blocks together, from block `first` on."""
        assert self.places is not None
        tokens = slice(first * self.block, (first + count) * self.block)
        text = self.places[:, tokens].argsort(dim=1)  # ties are broken by the order of the text
        keys = ordered(self.keys[:, tokens], text).to(accumulation_dtype(self.features.dtype))
        order = text.gather(1, similar_order(keys, count * self.block // cell))
        for name in self.OF_TOKENS:
            rows = getattr(self, name)
            if rows is not None:
                rows[:, tokens] = ordered(rows[:, tokens], order)
        blocks = (rows[:, tokens].unflatten(1, (-1, self.block)) for rows in self._rows())
        self._summarise(slice(first, first + count), *blocks)

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in all."""
        if length > self.keys.shape[1]:
            self._grow(length)

    @outside_inference_mode
    def _grow(self, length: int) -> None:
        blocks = max(-(-length // self.block), 2 * self.features.shape[1])
        of_tokens = self.OF_TOKENS if self.pages is None else ()
        for names, count in ((of_tokens, blocks * self.block), (self.OF_BLOCKS, blocks)):
            for name in names:
                rows = getattr(self, name)
                if rows is not None:
                    setattr(self, name, F.pad(rows, (*(0, 0) * (rows.ndim - 2), 0, count - rows.shape[1])))
        if self.places is not None:
            new = torch.arange(self.places.shape[1], dtype=torch.int32, device=self.places.device)
            self.places[:, self.length :] = new[self.length :]


def ordered(rows: Tensor, order: Tensor) -> Tensor:
    """(R, n, ...) with row order[r, i] of r at i."""
    return rows.take_along_dim(order.view(*order.shape, *[1] * (rows.ndim - 2)), 1)


class LocalCache(KeysAndValues):
    """The last `window` keys and values of a local route; the token at position p lies in slot p % window."""

    def __init__(
        self, rows: int, window: int, head_dim: int, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        super().__init__(rows, window, head_dim, device, dtype)
        self.window = window

    def last(self, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The last `count` keys and values in the order of the text; count <= min(length, window)."""
        places = torch.arange(self.length - count, self.length, device=self.keys.device) % self.window
        return self.keys.index_select(1, places).to(dtype), self.values.index_select(1, places).to(dtype)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add (R, m, d) keys and values, dropping what leaves the window."""
        count = keys.shape[1]
        kept = min(count, self.window)
        places = (
            torch.arange(self.length + count - kept, self.length + count, device=keys.device) % self.window
        )
        self.write(places, keys[:, count - kept :], values[:, count - kept :])
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

    def regroup(self) -> None:
        """See `GlobalCache.regroup`; what is read completely may lie as it does."""
        if self.global_cache is not None and not self.exact:
            self.global_cache.regroup()

    def select(self, texts: Tensor) -> None:
        """Go on with the texts (B',) of the batch only, in that order, as a beam search does."""
        for part in (self.global_cache, self.local_cache):
            if part is not None:
                heads = len(part.keys) // self.batch_size
                rows = texts[:, None] * heads + torch.arange(heads, device=texts.device)
                part.select(rows.flatten().to(part.keys.device))
        self.batch_size = len(texts)
