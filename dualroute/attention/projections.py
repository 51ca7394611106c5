"""The weights of the attention layer, and what it does to single tokens: all but the attention itself.

In: hidden states (..., dim). Out: queries, keys and values of each route; and back, the heads of both routes,
gated and projected to (..., dim). `layer` runs it on whole texts, `decoding` token by token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualroute.attention.core.options import Heads
from dualroute.attention.core.precision import without_autocast
from dualroute.attention.core.rope import Rope, Table, rotate
from dualroute.attention.core.routing import Routing, exact_blocks


class Projections(nn.Module):
    """Projections of two routes, their normalisation and rotation, gate and output.

    Args:
        dim: width of the hidden states.
        heads: how the heads are divided.
        qkv_bias, qk_norm, gate: see `DualRouting`.
    """

    #: set by `DualRouting`
    window: int
    block: int
    causal: bool
    global_mode: str
    auto_break_even: int
    global_rope: Rope
    local_rope: Rope
    routing: Routing

    def __init__(self, dim: int, heads: Heads, *, qkv_bias: bool, qk_norm: bool, gate: bool) -> None:
        super().__init__()
        self.dim = dim
        self.head_dim, self.group, self.global_heads, self.local_heads = heads
        self.global_qkv = self._qkv(self.global_heads, qkv_bias)
        self.local_qkv = self._qkv(self.local_heads, qkv_bias)
        both = self.global_heads + self.local_heads
        self.out_proj = nn.Linear(both * self.head_dim, dim, bias=False)
        self.query_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.key_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None
        # A bare parameter, not a Linear: no initialiser that walks over the layers may move the gate from 1.
        self.gate_weight = nn.Parameter(torch.empty(both, dim)) if gate else None
        if self.gate_weight is not None:
            nn.init.zeros_(self.gate_weight)
        #: (H,) factors of the heads' outputs, the global route's first; None = all 1
        self.head_scale: Tensor | None
        self.register_buffer("head_scale", None, persistent=False)
        self.collect_statistics = False
        self.statistics: dict[str, Tensor] = {}

    def _qkv(self, heads: int, bias: bool) -> nn.Linear | None:
        if heads == 0:
            return None
        projection = nn.Linear(self.dim, (heads + 2 * heads // self.group) * self.head_dim, bias=bias)
        if bias:
            nn.init.zeros_(projection.bias)
        return projection

    @property
    def max_exact_blocks(self) -> int | None:
        """Documents of at most this many blocks are read in full by the global route; None = all."""
        return exact_blocks(self.global_mode, self.block, self.routing.top_k, self.auto_break_even)

    def split_heads(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (S, H, d), keys and values (S, H_kv, d) of projected rows, normalised if the layer does."""
        rows = rows.unflatten(-1, (-1, self.head_dim))  # (S, H + 2 H_kv, d)
        kv_heads = rows.shape[1] // (self.group + 2)
        query, key, value = rows.split([kv_heads * self.group, kv_heads, kv_heads], dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = _normalise(query, self.query_norm), _normalise(key, self.key_norm)
        return query, key, value

    def rotary_tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Table | None, Table | None]:
        """Tables of positions (S,) for the global and the local route; None where a route turns nothing."""
        ropes = (self.global_rope, self.local_rope)
        tables = {rope: rope.table(positions, dtype) if rope.channels else None for rope in set(ropes)}
        return tables[ropes[0]], tables[ropes[1]]

    def rotated_heads(self, rows: Tensor, table: Table | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (H, S, d), keys and values (H_kv, S, d) of projected rows, turned as the table says."""
        query, key, value = self.split_heads(rows)
        return rotate(query, table), rotate(key, table), value.transpose(0, 1).contiguous()

    def combine(self, heads: Tensor, hidden_states: Tensor) -> Tensor:
        """Gate and scale the heads (B, n, H * d) of both routes and project them back to (B, n, dim)."""
        if self.gate_weight is not None:
            gate = 2 * torch.sigmoid(nn.functional.linear(hidden_states, self.gate_weight))  # (B, n, H)
            heads = (heads.unflatten(-1, (-1, self.head_dim)) * gate[..., None].to(heads.dtype)).flatten(2)
        if self.head_scale is not None:
            scale = self.head_scale.to(heads.dtype).repeat_interleave(self.head_dim)
            heads = heads * scale
        if self.collect_statistics:
            if self.gate_weight is not None:
                mean = gate.detach().float().mean((0, 1))
            else:
                mean = torch.ones(self.global_heads + self.local_heads, device=heads.device)
            for name, part in (("global", mean[: self.global_heads]), ("local", mean[self.global_heads :])):
                self.statistics[f"gate_{name}"] = part.mean() if len(part) else torch.ones_like(mean[0])
        return self.out_proj(heads)


@without_autocast
def _normalise(rows: Tensor, norm: nn.RMSNorm) -> Tensor:
    return norm(rows.to(norm.weight.dtype)).to(rows.dtype)
