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

from typing import Any

import torch
from torch import Tensor, nn

from dualroute.attention.compiled import global_attention as compiled_global
from dualroute.attention.compiled import lay_out_in_graph, tracing
from dualroute.attention.compiled import local_attention as compiled_local
from dualroute.attention.core.cache import LayerCache
from dualroute.attention.core.grid import Grid, check_grid
from dualroute.attention.core.layout import Layout
from dualroute.attention.core.options import (
    AUTO_BREAK_EVEN,
    check_rotary,
    check_routes,
    resolve_heads,
    rotary_channels,
)
from dualroute.attention.core.rope import Rope, RopeScaling
from dualroute.attention.core.routing import Routing, SharedChoice
from dualroute.attention.decoding import check_cache, decode, new_cache
from dualroute.attention.projections import Projections
from dualroute.attention.routes import global_attention, local_attention
from dualroute.attention.sequence_parallel import Group, check_group, gather_heads, scatter_heads
from dualroute.attention.statistics import routing_statistics


class DualRouting(Projections):
    """The attention layer.

    Args:
        dim: width of the hidden states.
        num_heads: query heads in all; `global_heads` and `local_heads` default to half of them each (see
            `core.options.resolve_heads`), or, when one of the two is given, to what that leaves. Given both,
            any split is allowed: num_heads each is the literal sum of two full attentions.
        num_kv_heads: key/value heads in all, for grouped-query attention; each route keeps the ratio to its
            heads.
        head_dim: dim / num_heads by default; even.
        window: keys a local head sees, the token's own included.
        global_mode: "full" reads the document exactly, at quadratic cost. "routed" reads own block, sink,
            top_k blocks and the far summary; documents of at most top_k + 2 blocks are read completely either
            way, and there the two are equal. "auto" is full for documents up to `auto_break_even` tokens,
            where routing would not be faster, and routed for longer ones: the same parameters, but for a
            long document a cheaper approximation. The choice depends on each document's own length (a cache:
            on its max_length), never on what shares its batch. To train exactly what will be run at greater
            lengths, choose "routed".
        auto_break_even: tokens up to which global_mode="auto" reads a document in full.
        block: tokens per block.
        top_k: chosen blocks per token, besides its own and the sink.
        router: "minmax", "moment" or "mean"; see `router`.
        sub_block: tokens per bound of the minmax router.
        far_summary: "second_order", "first_order" or "none"; see `far_summary`.
        cluster_span: tokens of the longest past span whose blocks are made of similar keys, block times 1, 2,
            4, ...; 0 leaves blocks as they stand in the text. See `core.clusters`.
        causal: False reads both directions; such a layer has no cache.
        grid: every document is an image of this size (see `core.grid`), its patches in raster order: blocks
            are regions, `window` counts patches in each direction of both axes, and the rotary embedding
            turns half of each head by the row, half by the column. Not causal; block is that of the grid's
            regions.
        rope_theta: base of the rotary embedding.
        rope_scaling: how its frequencies are lowered; None = not at all.
        global_rotary_factor, local_rotary_factor: share of a head's channels that the rotary embedding turns,
            for each route (see `core.rope`): 1 all, 0 none, which leaves a route without positions but for
            its mask.
        qkv_bias: add a bias to queries, keys and values (as Qwen2 does); 0 at the start.
        qk_norm: RMS-normalise queries and keys per head, with one weight each for both routes.
        gate: multiply each head of each token by 2 sigmoid(w . x); w starts at 0, so the gate starts at 1.

    Attributes:
        collect_statistics: set it to have the next forward fill `statistics` (see `statistics`, plus
            `gate_global` and `gate_local`, the mean gates; 1 without a gate). Without global heads only the
            gates are there.
        collect_map: have `block_map` among them.
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
        auto_break_even: int = AUTO_BREAK_EVEN,
        block: int = 64,
        top_k: int = 8,
        router: str = "minmax",
        sub_block: int = 16,
        far_summary: str = "second_order",
        cluster_span: int = 0,
        causal: bool = True,
        grid: Grid | None = None,
        rope_theta: float = 10000.0,
        rope_scaling: RopeScaling | None = None,
        global_rotary_factor: float = 1.0,
        local_rotary_factor: float = 1.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        gate: bool = False,
    ) -> None:
        check_routes(
            window=window,
            global_mode=global_mode,
            auto_break_even=auto_break_even,
            block=block,
            top_k=top_k,
            router=router,
            sub_block=sub_block,
            far_summary=far_summary,
            rope_theta=rope_theta,
            cluster_span=cluster_span,
            causal=causal,
        )
        heads = resolve_heads(
            dim=dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            global_heads=global_heads,
            local_heads=local_heads,
        )
        super().__init__(dim, heads, qkv_bias=qkv_bias, qk_norm=qk_norm, gate=gate)
        if grid is not None:
            check_grid(
                grid, block=block, causal=causal, head_dim=heads.head_dim, scaled=rope_scaling is not None
            )
        factors = {"global_rotary_factor": global_rotary_factor, "local_rotary_factor": local_rotary_factor}
        check_rotary(heads.head_dim, grid=grid is not None, **factors)
        self.window, self.block, self.causal, self.grid = window, block, causal, grid
        self.global_rope, self.local_rope = (
            Rope(heads.head_dim, rotary_channels(heads.head_dim, factor), rope_theta, rope_scaling)
            for factor in factors.values()
        )
        self.global_mode, self.auto_break_even = global_mode, auto_break_even
        self.routing = Routing(top_k, router, far_summary, sub_block, cluster_span)
        self.sequence_group: Group | None = None

    def extra_repr(self) -> str:
        return (
            f"global_heads={self.global_heads}, local_heads={self.local_heads}, group={self.group}, "
            f"window={self.window}, global_mode={self.global_mode}, block={self.block}, {self.routing}, "
            f"causal={self.causal}, rotary channels {self.global_rope.channels} global and "
            f"{self.local_rope.channels} local of {self.head_dim}"
        )

    def forward(
        self,
        hidden_states: Tensor,
        *,
        layout: Layout | None = None,
        segment_ids: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        choice: SharedChoice | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            hidden_states: (B, n, dim).
            layout: the batch's `Layout`, built once for all layers; made here from the next three when None.
            segment_ids, attention_mask: (B, n), see `Layout.build`.
            positions: (B, n) for the rotary embedding; by default those inside each document.
            cache: of `new_cache`; hidden_states are then the next n tokens of every row, without padding.
            choice: of this forward pass, given to several layers: they read the blocks that the first of them
                chooses. They have equally many global key heads, and the same top_k, block and global_mode.
                Behind tokens in a cache, `decoding.share_choices` of the caches counts instead.

        Returns:
            (B, n, dim); 0 at padding.

        Raises:
            ValueError: shapes do not fit together, or the cache is full or combined with documents or
            padding.
        """
        batch, length, _ = hidden_states.shape
        group = self.sequence_group if cache is None else None
        if group is not None:
            check_group(group, self.group, global_heads=self.global_heads, local_heads=self.local_heads)
            length *= group.size()
        if cache is not None:
            if layout is not None or segment_ids is not None or attention_mask is not None:
                raise ValueError(
                    "cache cannot be combined with layout, segment_ids or attention_mask: "
                    "give rows of equal length"
                )
            check_cache(cache, batch, length)
            if cache.length:
                return decode(self, hidden_states, positions, cache)
        lay_out = lay_out_in_graph if tracing() else Layout.of_batch
        layout = lay_out(
            layout, batch, length, self.block, segment_ids, attention_mask, hidden_states.device, self.grid
        )
        outputs = []
        if self.global_qkv is not None:
            outputs.append(self._global(hidden_states, layout, positions, cache, choice))
        if self.local_qkv is not None:
            outputs.append(self._local(hidden_states, layout, positions, cache))
        heads = torch.cat([out.transpose(0, 1) for out in outputs], dim=1)  # (S, H, d)
        rows = layout.from_stream(heads.flatten(1))  # (B, n, H * d)
        if group is not None:
            of_routes = [count for count in (self.global_heads, self.local_heads) if count]
            rows = gather_heads(rows.unflatten(-1, (-1, self.head_dim)), group, of_routes).flatten(2)
        return self.combine(rows, hidden_states)

    def _global(
        self,
        hidden_states: Tensor,
        layout: Layout,
        positions: Tensor | None,
        cache: LayerCache | None,
        choice: SharedChoice | None,
    ) -> Tensor:
        assert self.global_qkv is not None
        rows = self.stream_heads(
            self.global_qkv, self.global_rope, hidden_states, layout, positions, cache is None
        )
        how: dict[str, Any] = {
            "routing": self.routing,
            "max_exact_blocks": self.max_exact_blocks,
            "causal": self.causal,
            "choice": choice,
        }
        if cache is not None and cache.global_cache is not None:
            cache.global_cache.append(*(layout.text_rows(part) for part in rows[1:]))
            how["max_exact_blocks"] = None if cache.exact else self.routing.top_k + 2
        if self.collect_statistics:
            self.statistics = routing_statistics(*rows, layout.stream, block_map=self.collect_map, **how)
        if tracing():
            return compiled_global(*rows, layout.handle, **how)
        return global_attention(*rows, layout.stream, **how)

    def _local(
        self, hidden_states: Tensor, layout: Layout, positions: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        assert self.local_qkv is not None
        rows = self.stream_heads(
            self.local_qkv, self.local_rope, hidden_states, layout, positions, cache is None
        )
        if cache is not None and cache.local_cache is not None:
            cache.local_cache.append(*(layout.text_rows(part) for part in rows[1:]))
        if tracing():
            return compiled_local(*rows, layout.handle, window=self.window, causal=self.causal)
        return local_attention(*rows, layout.stream, window=self.window, causal=self.causal)

    def stream_heads(
        self,
        projection: nn.Linear,
        rope: Rope,
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
        return self.rotated_heads(rows, layout.rotary_table(positions, rope, rows.dtype))

    def prepare(self, layout: Layout, dtype: torch.dtype) -> None:
        """Have the layout keep what `forward` reads of it, for hidden states of this type: what is kept is an
        input of a compiled layer, what is not is computed in it."""
        for projection, rope in ((self.global_qkv, self.global_rope), (self.local_qkv, self.local_rope)):
            if projection is not None:
                layout.rotary_table(None, rope, dtype)

    new_cache = new_cache
