"""A global cache whose complete blocks are integers of 8 or 4 bits; the newest token's block stays float.

In and out: as `core.cache`. A number x is stored as the integer c = round((x - low) / step), 0 <= c < 2^bits,
and read as low + step * c, at most half a step off. The grids (low, step) are bfloat16:

    keys      one for each channel of a block: channels differ in size, and a channel keeps its own from token
              to token (KIVI, arXiv 2402.02750; KVQuant, arXiv 2401.18079)
    values    one for each token
    bounds    of the minmax router: on the grid of the block's keys, so that the integer of the largest stored
              key *is* the bound of the stored keys, without a further error

Other statistics are bfloat16, of the keys and values before they were rounded. Two integers of 4 bits share a
byte, channel i in the low half and channel i + d / 2 in the high one.

A token reads its own block as floats, also when it is the last one of it, and every
earlier block as it is stored. So a chunk of a prompt is read block by block, and however a text is cut into
chunks behind its first one, it is read alike. Nothing of it has gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualroute.attention.core.cache import GlobalCache, Place, ordered, put
from dualroute.attention.core.clusters import similar_order
from dualroute.attention.core.precision import accumulation_dtype
from dualroute.attention.core.router import block_features

BITS = {"int8": 8, "int4": 4}


class QuantizedGlobalCache(GlobalCache):
    """`GlobalCache` with integers of `bits` bits.

    `tail_keys` and `tail_values` (R, block, d) are the floats of the newest token's block, in `dtype`."""

    OF_TOKENS = ("keys", "values", "value_grids", "places")
    OF_BLOCKS = ("features", "far_keys", "far_values", "key_grids")
    OF_TEXTS = ("tail_keys", "tail_values")
    bits: int

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
        bits: int,
        cluster_span: int = 0,
    ) -> None:
        width, blocks = head_dim * bits // 8, -(-capacity // block)
        super().__init__(
            rows, 0, head_dim, block, router, sub_block, far_summary, device, torch.bfloat16
        )  # no rows yet
        self.bits, self.cluster_span = bits, cluster_span
        if cluster_span:
            places = torch.arange(blocks * block, dtype=torch.int32, device=device)
            self.places = places.repeat(rows, 1)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(rows, *shape, device=device, dtype=dtype)

        self.tail_keys, self.tail_values = (zeros(block, head_dim, dtype=dtype) for _ in range(2))
        self.keys, self.values = (zeros(blocks * block, width, dtype=torch.uint8) for _ in range(2))
        self.value_grids = zeros(blocks * block, 2, dtype=torch.bfloat16)
        self.key_grids = zeros(blocks, 2, head_dim, dtype=torch.bfloat16)
        if router == "minmax":
            self.features = zeros(blocks, block // sub_block, 2 * width, dtype=torch.uint8)
        else:
            self.features = zeros(blocks, *self.features.shape[2:], dtype=torch.bfloat16)
        for name in ("far_keys", "far_values"):
            empty = getattr(self, name)
            if empty is not None:
                setattr(self, name, zeros(blocks, empty.shape[2], dtype=torch.bfloat16))

    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor) -> None:
        begin, end = self.length, self.length + keys.shape[1]
        self.reserve(end)
        first, held = begin // self.block, begin % self.block
        tails = self.tail_keys, self.tail_values
        keys, values = (
            torch.cat([tail[:, :held], rows.to(tail.dtype)], dim=1) if held else rows.to(tail.dtype)
            for tail, rows in zip(tails, (keys, values), strict=True)
        )  # from the first token of block `first` on
        complete = end // self.block - first
        if complete:
            tokens = complete * self.block
            blocks = (rows[:, :tokens].unflatten(1, (-1, self.block)) for rows in (keys, values))
            self._summarise(slice(first, first + complete), *blocks)
            if self.pages is not None:
                self.pages.release()
        self.length = end
        behind = (self.own - first) * self.block
        for tail, rows in zip(tails, (keys, values), strict=True):
            tail[:, : rows.shape[1] - behind] = rows[:, behind:]

    @torch.no_grad()
    def put_token(self, key: Tensor, value: Tensor, position: Tensor, *, statistics: bool) -> None:
        place = (position % self.block).view(1)
        put(self.tail_keys, place, key[:, None])
        put(self.tail_values, place, value[:, None])
        self._summarise((position // self.block).view(1), self.tail_keys[:, None], self.tail_values[:, None])

    def _summarise(self, place: Place, keys: Tensor, values: Tensor) -> None:
        """Store blocks, whose keys and values are (R, n, block, d), and their statistics."""
        wide = accumulation_dtype(keys.dtype)
        keys, values = keys.to(wide), values.to(wide)
        key_grids, of_keys = to_grid(keys, 2, self.bits)
        value_grids, of_values = to_grid(values, 3, self.bits)
        put(self.key_grids, place, key_grids)
        per_token = (self.keys, pack(of_keys, self.bits)), (self.values, pack(of_values, self.bits))
        for stored, blocks in (*per_token, (self.value_grids, value_grids)):
            put(stored.unflatten(1, (-1, self.block)), place, blocks)
        if self.router == "minmax":
            bounds = block_features(of_keys, self.router, self.sub_block)  # (R, n, parts, 2 d)
            packed = torch.cat([pack(part, self.bits) for part in bounds.chunk(2, dim=-1)], dim=-1)
            put(self.features, place, packed)
        else:
            put(self.features, place, block_features(keys, self.router, self.sub_block))
        self._summarise_far(place, keys, values)

    @torch.no_grad()
    def _regroup(self, first: int, count: int, cell: int) -> None:
        """Put similar keys together; what moves to another block is rounded anew, on that one's grid."""
        assert self.places is not None
        tokens = slice(first * self.block, (first + count) * self.block)
        numbers = torch.arange(first, first + count, device=self.places.device).expand(len(self.places), -1)
        stored = self._stored(numbers, accumulation_dtype(self.tail_keys.dtype))
        text = self.places[:, tokens].argsort(dim=1)
        order = text.gather(1, similar_order(ordered(stored[0], text), count * self.block // cell))
        self.places[:, tokens] = ordered(self.places[:, tokens], order)
        blocks = (ordered(rows, order).unflatten(1, (-1, self.block)) for rows in stored)
        self._summarise(slice(first, first + count), *blocks)

    def router_features(self, first: int, last: int) -> Tensor:
        features = self.features[:, first:last]
        if self.router != "minmax":
            return features
        wide = accumulation_dtype(self.tail_keys.dtype)
        low, step = self.key_grids[:, first:last, :, None].to(wide).unbind(2)  # (R, n, 1, d)
        return torch.cat(
            [low + step * unpack(part, self.bits).to(wide) for part in features.chunk(2, dim=-1)], dim=-1
        )

    def read_first(self, count: int, own: int | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        blocks = -(-count // self.block)
        device = self.features.device
        every = torch.arange(blocks, device=device).expand(len(self.keys), -1)
        place = own.view(1) if isinstance(own, Tensor) else torch.tensor([own], device=device)
        keys, values = (
            rows.unflatten(1, (-1, self.block)).index_copy(1, place, tail[:, None].to(dtype)).flatten(1, 2)
            for rows, tail in zip(self._stored(every, dtype), (self.tail_keys, self.tail_values), strict=True)
        )
        return keys[:, :count], values[:, :count]

    def read_blocks(self, numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys, values = self._stored(numbers[:, :-1], dtype)
        return (
            torch.cat([keys, self.tail_keys.to(dtype)], dim=1),
            torch.cat([values, self.tail_values.to(dtype)], dim=1),
        )

    def _stored(self, numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values (R, k * block, d) of complete blocks (R, k)."""
        wide = accumulation_dtype(dtype)
        keys, values, grids = (
            self._picked(rows, numbers) for rows in (self.keys, self.values, self.value_grids)
        )
        low, step = grids.to(wide).split(1, dim=-1)
        row = torch.arange(len(numbers), device=numbers.device)[:, None]
        key_low, key_step = self.key_grids[row, numbers].to(wide).split(1, dim=2)  # (R, k, 1, d)
        wide_keys = unpack(keys, self.bits).to(wide).unflatten(1, (-1, self.block))
        wide_values = unpack(values, self.bits).to(wide)
        return (key_low + key_step * wide_keys).flatten(1, 2).to(dtype), (low + step * wide_values).to(dtype)


def to_grid(numbers: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """The grid and the integers of numbers (R, n, block, d) that share a grid along `dim`, 2 or 3.

    Returns:
        (low, step) in bfloat16, (R, n, 2, d) for dim 2 and (R, n, block, 2) for dim 3, and uint8 integers of
        the shape of the numbers. low <= every number <= low + step * (2^bits - 1); where one is no finite
        number, low and step are NaN.
    """
    levels = 2**bits - 1
    least, most = numbers.amin(dim, keepdim=True), numbers.amax(dim, keepdim=True)
    low = _down(least)
    step = -_down((low.to(most.dtype) - most) / levels)  # rounded up
    finite = torch.isfinite(most - least)
    low, step = torch.where(finite, low, torch.nan), torch.where(finite, step, torch.nan)
    offset, wide_step = low.to(numbers.dtype), step.to(numbers.dtype)
    codes = ((numbers - offset) / torch.where(wide_step > 0, wide_step, 1)).round().clamp(0, levels)
    return torch.cat([low, step], dim=dim), codes.nan_to_num().to(torch.uint8)


def _down(numbers: Tensor) -> Tensor:
    """The largest bfloat16 that is not above each number."""
    bits = numbers.to(torch.float32).contiguous().view(torch.int32) & ~0xFFFF
    near = bits.view(torch.float32)  # towards zero, but for the rounding of a float64
    below = torch.where(bits >= 0, bits - 0x10000, bits + 0x10000).view(torch.float32)
    return torch.where(near.to(numbers.dtype) > numbers, below, near).to(torch.bfloat16)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers (..., d) as bytes (..., d * bits / 8)."""
    if bits == 8:
        return codes
    low, high = codes.chunk(2, dim=-1)
    return low | high << 4


def unpack(packed: Tensor, bits: int) -> Tensor:
    """What `pack` was given."""
    return packed if bits == 8 else torch.cat([packed & 15, packed >> 4], dim=-1)
