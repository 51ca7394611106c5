"""DualRouting: a global route and a local route with projections of their own, summed.

In: hidden states (B, n, dim), as the layers of `dualroute.model` hand them on, and the `Layout` of the batch.
Out: (B, n, dim),
    y_t = W_O^g concat_heads(o^g_t) + W_O^l concat_heads(o^l_t),
computed as one product of W_O = [W_O^g, W_O^l] with the heads of both routes side by side.

With half of the heads on each route (the default) this has exactly the parameters of a
dense attention layer, and with `local_heads=0, global_mode="full"` it *is* one: the baseline is the same
code.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from dualroute.attention.backends.torch.decode import decode_global, decode_local, token_kernels
from dualroute.attention.backends.torch.full import GLOBAL_MODES, exact_blocks, global_attention
from dualroute.attention.backends.torch.local import local_attention
from dualroute.attention.backends.torch.routed import Routing
from dualroute.attention.backends.torch.tile_attention import without_autocast
from dualroute.attention.core.cache import GlobalCache, LayerCache, LocalCache
from dualroute.attention.core.far_summary import FAR_SUMMARIES
from dualroute.attention.core.layout import Layout
from dualroute.attention.core.options import (
    check_at_least,
    check_name,
    resolve_group,
    resolve_head_dim,
    resolve_heads,
)
from dualroute.attention.core.rope import RopeScaling, rotary_table, rotate
from dualroute.attention.core.router import ROUTERS
from dualroute.attention.sequence_parallel import Group, gather_heads, scatter_heads
from dualroute.attention.statistics import routing_statistics


class DualRouting(nn.Module):
    """The attention layer.

    Args:
        dim: width of the hidden states.
        num_heads: query heads in all; `global_heads` and `local_heads` default to half of them each, or, when
            one of the two is given, to what that leaves. Given both, any split is allowed: num_heads each is
            the literal sum of two full attentions.
        num_kv_heads: key/value heads in all, for grouped-query attention; each route keeps the ratio to its
            heads.
        head_dim: dim / num_heads by default; even.
        window: keys a local head sees, the token's own included.
        global_mode: "full" reads the document exactly, at quadratic cost. "routed" reads own block, sink,
            top_k blocks and the far summary; documents of at most top_k + 2 blocks are read completely either
            way, and there the two are equal. "auto" is full for documents up to `AUTO_BREAK_EVEN` tokens,
            where routing would not be faster, and routed for longer ones: the same parameters, but for a
            long document a cheaper approximation. The choice depends on each document's own length (a cache:
            on its max_length), never on what shares its batch. To train exactly what will be run at greater
            lengths, choose "routed".
        block: tokens per block.
        top_k: chosen blocks per token, besides its own and the sink.
        router: "minmax", "moment" or "mean"; see `router`.
        sub_block: tokens per bound of the minmax router.
        far_summary: "second_order", "first_order" or "none"; see `far_summary`.
        causal: False reads both directions; such a layer has no cache.
        rope_theta: base of the rotary embedding.
        rope_scaling: how its frequencies are lowered; None = not at all.
        qkv_bias: add a bias to queries, keys and values (as Qwen2 does); 0 at the start.
        qk_norm: RMS-normalise queries and keys per head, with one weight each for both routes.
        gate: multiply each head of each token by 2 sigmoid(w . x); w starts at 0, so the gate starts at 1.

    Attributes:
        collect_statistics: set it to have the next forward fill `statistics` (see `statistics`, plus
            `gate_global` and `gate_local`, the mean gates; 1 without a gate). Without global heads only the
            gates are there.
        sequence_group: P ranks that share every text (see `sequence_parallel`), None = this one alone. The
            hidden states of `forward` are then this rank's n/P tokens; layout, positions, segment_ids and
            attention_mask stay those of all n. The heads of each route, and their key heads, must be
            multiples of P. Statistics are those of this rank's heads; a cache is filled by each rank alone.

    Raises:
        ValueError: an argument is out of range or contradicts another one.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        global_heads: int | None = None,
        local_heads: int | None = None,
        window: int = 128,
        global_mode: str = "auto",
        block: int = 64,
        top_k: int = 8,
        router: str = "minmax",
        sub_block: int = 16,
        far_summary: str = "second_order",
        causal: bool = True,
        rope_theta: float = 10000.0,
        rope_scaling: RopeScaling | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        gate: bool = False,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim, num_heads=num_heads, window=window, block=block, sub_block=sub_block)
        check_at_least(0, top_k=top_k)
        check_name("global_mode", global_mode, GLOBAL_MODES)
        check_name("router", router, ROUTERS)
        check_name("far_summary", far_summary, FAR_SUMMARIES)
        self.dim = dim
        self.head_dim = resolve_head_dim(dim, num_heads, head_dim)
        self.global_heads, self.local_heads = resolve_heads(num_heads, global_heads, local_heads)
        group = resolve_group(num_heads, num_kv_heads)
        for name, heads in (("global_heads", self.global_heads), ("local_heads", self.local_heads)):
            if heads % group:
                raise ValueError(
                    f"{name}={heads} is not a multiple of {group}, the query heads per key head "
                    f"(num_heads={num_heads} / num_kv_heads={num_kv_heads}): change one of them"
                )
        self.group = group
        if router == "minmax" and block % sub_block and self.global_heads:
            raise ValueError(
                f"block={block} is not a multiple of sub_block={sub_block}, which the minmax router needs: "
                f"use block={-(-block // sub_block) * sub_block}, another sub_block, or router=moment"
            )
        self.window, self.block, self.causal = window, block, causal
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        self.global_mode = global_mode
        self.routing = Routing(top_k, router, far_summary, sub_block)

        self.global_qkv = self._qkv(self.global_heads, qkv_bias)
        self.local_qkv = self._qkv(self.local_heads, qkv_bias)
        heads = self.global_heads + self.local_heads
        self.out_proj = nn.Linear(heads * self.head_dim, dim, bias=False)
        self.query_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.key_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None
        # A bare parameter, not a Linear: no initialiser that walks over the layers may move the gate from 1.
        self.gate_weight = nn.Parameter(torch.zeros(heads, dim)) if gate else None
        self.collect_statistics = False
        self.statistics: dict[str, Tensor] = {}
        self.sequence_group: Group | None = None

    def _qkv(self, heads: int, bias: bool) -> nn.Linear | None:
        if heads == 0:
            return None
        projection = nn.Linear(self.dim, (heads + 2 * heads // self.group) * self.head_dim, bias=bias)
        if bias:
            nn.init.zeros_(projection.bias)
        return projection

    def extra_repr(self) -> str:
        return (
            f"global_heads={self.global_heads}, local_heads={self.local_heads}, group={self.group}, "
            f"window={self.window}, global_mode={self.global_mode}, block={self.block}, {self.routing}, "
            f"causal={self.causal}"
        )

    @property
    def max_exact_blocks(self) -> int | None:
        """Documents of at most this many blocks are read in full by the global route; None = all."""
        return exact_blocks(self.global_mode, self.block, self.routing.top_k)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        layout: Layout | None = None,
        segment_ids: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            hidden_states: (B, n, dim).
            layout: the batch's `Layout`, built once for all layers; made here from the next three when None.
            segment_ids, attention_mask: (B, n), see `Layout.build`.
            positions: (B, n) for the rotary embedding; by default those inside each document.
            cache: of `new_cache`; hidden_states are then the next n tokens of every row, without padding.

        Returns:
            (B, n, dim); 0 at padding.

        Raises:
            ValueError: shapes do not fit together, or the cache is full or combined with documents or
            padding.
        """
        batch, length, _ = hidden_states.shape
        group = self.sequence_group if cache is None else None
        if group is not None:
            self._check_sequence_group(group)
            length *= group.size()
        if cache is not None:
            if layout is not None or segment_ids is not None or attention_mask is not None:
                raise ValueError(
                    "cache cannot be combined with layout, segment_ids or attention_mask: "
                    "give rows of equal length"
                )
            self._check_cache(cache, batch, length)
            if cache.length:
                return self._decode(hidden_states, positions, cache)
        if layout is None:
            layout = Layout.build(
                batch, length, self.block, segment_ids, attention_mask, device=hidden_states.device
            )
        elif segment_ids is not None or attention_mask is not None:
            raise ValueError("layout already holds segment_ids and attention_mask: give either it or them")
        elif (layout.batch, layout.length, layout.block) != (batch, length, self.block):
            raise ValueError(
                f"layout is for batch {layout.batch}, length {layout.length}, block {layout.block}; "
                f"the layer got batch {batch}, length {length} and has block={self.block}: build it for these"
            )
        outputs = []
        if self.global_qkv is not None:
            outputs.append(self._global(hidden_states, layout, positions, cache))
        if self.local_qkv is not None:
            outputs.append(self._local(hidden_states, layout, positions, cache))
        heads = torch.cat([out.transpose(0, 1) for out in outputs], dim=1)  # (S, H, d)
        rows = layout.from_stream(heads.flatten(1))  # (B, n, H * d)
        if group is not None:
            of_routes = [count for count in (self.global_heads, self.local_heads) if count]
            rows = gather_heads(rows.unflatten(-1, (-1, self.head_dim)), group, of_routes).flatten(2)
        return self._combine(rows, hidden_states)

    def _check_sequence_group(self, group: Group) -> None:
        for name, heads in (("global_heads", self.global_heads), ("local_heads", self.local_heads)):
            if heads // self.group % group.size():
                raise ValueError(
                    f"{name}={heads} with {self.group} query heads per key head cannot be divided among the "
                    f"{group.size()} ranks of sequence_group: the key heads of each route must be a multiple"
                )

    def _global(
        self, hidden_states: Tensor, layout: Layout, positions: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        assert self.global_qkv is not None
        query, key, value = self._heads(self.global_qkv, hidden_states, layout, positions, cache is None)
        max_exact_blocks = self.max_exact_blocks
        if cache is not None and cache.global_cache is not None:
            cache.global_cache.append(_cache_rows(key, layout), _cache_rows(value, layout))
            max_exact_blocks = None if cache.exact else self.routing.top_k + 2
        if self.collect_statistics:
            self.statistics = routing_statistics(
                query,
                key,
                value,
                layout.stream,
                self.routing,
                max_exact_blocks=max_exact_blocks,
                causal=self.causal,
            )
        return global_attention(
            query,
            key,
            value,
            layout.stream,
            routing=self.routing,
            max_exact_blocks=max_exact_blocks,
            causal=self.causal,
        )

    def _local(
        self, hidden_states: Tensor, layout: Layout, positions: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        assert self.local_qkv is not None
        query, key, value = self._heads(self.local_qkv, hidden_states, layout, positions, cache is None)
        if cache is not None and cache.local_cache is not None:
            cache.local_cache.append(_cache_rows(key, layout), _cache_rows(value, layout))
        return local_attention(query, key, value, layout.stream, window=self.window, causal=self.causal)

    def _heads(
        self,
        projection: nn.Linear,
        hidden_states: Tensor,
        layout: Layout,
        positions: Tensor | None,
        divided: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (H, S, d), keys and values (H_kv, S, d) of one route on the stream, rotated.

        With a sequence group, `divided` and H / P heads.
        """
        rows = projection(hidden_states)  # (B, n, (H + 2 H_kv) d)
        if divided and self.sequence_group is not None:
            rows = rows.unflatten(-1, (-1, self.head_dim))
            kv_heads = rows.shape[2] // (self.group + 2)
            sections = [kv_heads * self.group, kv_heads, kv_heads]
            rows = scatter_heads(rows, self.sequence_group, sections).flatten(2)
        rows = layout.to_stream(rows)
        theta, scaling = self.rope_theta, self.rope_scaling
        table = layout.rotary_table(positions, self.head_dim, theta, rows.dtype, scaling)
        return self._rotated_heads(rows, table)

    def _split_heads(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (S, H, d), keys and values (S, H_kv, d) of projected rows, normalised if the layer does."""
        rows = rows.unflatten(-1, (-1, self.head_dim))  # (S, H + 2 H_kv, d)
        kv_heads = rows.shape[1] // (self.group + 2)
        query, key, value = rows.split([kv_heads * self.group, kv_heads, kv_heads], dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = _normalise(query, self.query_norm), _normalise(key, self.key_norm)
        return query, key, value

    def _rotated_heads(self, rows: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self._split_heads(rows)
        return rotate(query, table), rotate(key, table), value.transpose(0, 1).contiguous()

    def _combine(self, heads: Tensor, hidden_states: Tensor) -> Tensor:
        """Gate the heads (B, n, H * d) of both routes and project them back to (B, n, dim)."""
        if self.gate_weight is not None:
            gate = 2 * torch.sigmoid(nn.functional.linear(hidden_states, self.gate_weight))  # (B, n, H)
            heads = (heads.unflatten(-1, (-1, self.head_dim)) * gate[..., None].to(heads.dtype)).flatten(2)
            mean = gate.detach().float().mean((0, 1))
        else:
            mean = torch.ones(self.global_heads + self.local_heads, device=heads.device)
        if self.collect_statistics:
            for name, part in (("global", mean[: self.global_heads]), ("local", mean[self.global_heads :])):
                self.statistics[f"gate_{name}"] = part.mean() if len(part) else torch.ones_like(mean[0])
        return self.out_proj(heads)

    def new_cache(
        self,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        capacity: int | None = None,
        *,
        int8: bool = False,
    ) -> LayerCache:
        """An empty cache for texts of up to `max_length` tokens; device and dtype of the weights by default.

        There is room for all of them at once, or for `capacity` at first and for more when they come. `int8`
        stores keys and values as integers, with a scale for each token and head.

        Raises:
            ValueError: the layer is not causal, or a size is below 1.
        """
        if not self.causal:
            raise ValueError("causal=False: a layer that reads both directions cannot be run token by token")
        check_at_least(1, batch_size=batch_size, max_length=max_length)
        device = device or self.out_proj.weight.device
        dtype = dtype or self.out_proj.weight.dtype
        stored = torch.int8 if int8 else dtype
        limit = self.max_exact_blocks
        routing = self.routing
        global_cache = local_cache = None
        if self.global_heads:
            global_cache = GlobalCache(
                batch_size * self.global_heads // self.group,
                min(capacity or max_length, max_length),
                self.head_dim,
                self.block,
                routing.router,
                routing.sub_block,
                routing.far_summary,
                device,
                stored,
                dtype,
            )
        if self.local_heads:
            rows = batch_size * self.local_heads // self.group
            local_cache = LocalCache(rows, self.window, self.head_dim, device, stored)
        exact = limit is None or -(-max_length // self.block) <= limit
        return LayerCache(batch_size, max_length, exact, global_cache, local_cache)

    def _check_cache(self, cache: LayerCache, batch: int, length: int) -> None:
        if batch != cache.batch_size:
            raise ValueError(
                f"the cache is for batch_size={cache.batch_size}, hidden_states have {batch} rows"
            )
        if cache.length + length > cache.max_length:
            raise ValueError(
                f"the cache holds {cache.length} of max_length={cache.max_length} tokens, "
                f"{length} more do not fit: make a new one with a larger max_length"
            )

    def _decode(self, hidden_states: Tensor, positions: Tensor | None, cache: LayerCache) -> Tensor:
        """The next tokens, (B, m, dim), after those in the cache."""
        batch, count, _ = hidden_states.shape
        if count == 1 and positions is None and not torch.is_grad_enabled():
            token = self._decode_token(hidden_states[:, 0], cache)
            if token is not None:
                return self._combine(token[:, None], hidden_states)
        if positions is None:
            positions = cache.length + torch.arange(count, device=hidden_states.device)
        positions = positions.expand(batch, count).flatten()
        theta, scaling = self.rope_theta, self.rope_scaling
        table = rotary_table(positions, self.head_dim, theta, hidden_states.dtype, scaling)
        outputs = []
        if self.global_qkv is not None and cache.global_cache is not None:
            query, key, value = self._decode_heads(self.global_qkv, hidden_states, table)
            cache.global_cache.append(key, value)
            outputs.append(_decode_global(query, cache.global_cache, self.routing.top_k, cache.exact))
        if self.local_qkv is not None and cache.local_cache is not None:
            query, key, value = self._decode_heads(self.local_qkv, hidden_states, table)
            outputs.append(_decode_local(query, key, value, cache.local_cache))
        heads = [out.view(batch, -1, count, self.head_dim).transpose(1, 2).flatten(2) for out in outputs]
        return self._combine(torch.cat(heads, dim=-1), hidden_states)

    def _decode_token(self, rows: Tensor, cache: LayerCache) -> Tensor | None:
        """The heads of one new token of each text, (B, H * d), for rows (B, dim); None without kernels."""
        kernels = token_kernels(rows)
        if kernels is None:
            return None
        projected = [None if route is None else route(rows) for route in (self.global_qkv, self.local_qkv)]
        if not kernels.can_decode(next(part for part in projected if part is not None), cache):
            return None
        position = torch.tensor(cache.length)
        if cache.global_cache is not None:
            cache.global_cache.reserve(cache.length + 1)
        theta, scaling = self.rope_theta, self.rope_scaling
        cos, sin = rotary_table(position.view(1), self.head_dim, theta, rows.dtype, scaling)
        table, memory = (cos.flatten(), sin.flatten()), kernels.cache_memory([cache])
        heads = self.token_heads(kernels, projected, table, memory, 0, position)
        for part in (cache.global_cache, cache.local_cache):
            if part is not None:
                part.length += 1
        return heads

    def token_heads(
        self,
        kernels: ModuleType,
        projected: Sequence[Tensor | None],
        table: tuple[Tensor, Tensor],
        memory: Tensor,
        layer: int,
        position: Tensor,
    ) -> Tensor:
        """The heads of one new token of each text, (B, H * d), by `kernels` of `decode.token_kernels`.

        Args:
            projected: (B, (H + 2 H_kv) * d) of the global and the local projection, None where there is none.
            table: `rope.rotary_table` of the position, flat.
            memory, layer: the kernels' `cache_memory`, and the row of it that is this layer's; the cache is
                written in place, except for its lengths; its room must suffice.
            position: () int64, the number of tokens before this one.
        """
        rows = [None if part is None else self._normalised_heads(part) for part in projected]
        return kernels.decode_layer(
            rows,
            table,
            memory,
            layer,
            position,
            head_dim=self.head_dim,
            group=self.group,
            top_k=self.routing.top_k,
        )

    def _normalised_heads(self, rows: Tensor) -> Tensor:
        """Projected rows (B, (H + 2 H_kv) * d) with queries and keys normalised, if the layer does that."""
        if self.query_norm is None:
            return rows
        return torch.cat(self._split_heads(rows), dim=1).flatten(1)

    def _decode_heads(
        self, projection: nn.Linear, hidden_states: Tensor, table: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B * H_kv, group, m, d), keys and values (B * H_kv, m, d)."""
        batch, count, _ = hidden_states.shape
        parts = self._rotated_heads(projection(hidden_states).flatten(0, 1), table)  # (H, B * m, d)
        query, key, value = (
            rows.unflatten(1, (batch, count)).transpose(0, 1) for rows in parts
        )  # (B, H, m, d)
        return query.reshape(-1, self.group, count, self.head_dim), key.flatten(0, 1), value.flatten(0, 1)


_decode_global = without_autocast(decode_global)
_decode_local = without_autocast(decode_local)


def _cache_rows(rows: Tensor, layout: Layout) -> Tensor:
    """(H_kv, S, d) of a stream of B equal documents -> (B * H_kv, n, d)."""
    documents = rows.unflatten(1, (layout.batch, -1))[:, :, : layout.length]
    return documents.transpose(0, 1).flatten(0, 1)


@without_autocast
def _normalise(rows: Tensor, norm: nn.RMSNorm) -> Tensor:
    return norm(rows.to(norm.weight.dtype)).to(rows.dtype)
