"""The parts of a Transformer block that are not attention: the feed-forward, and the block itself.

Hidden states come in from the layer below, (B, n, dim); what attention and feed-forward find is added to
them; they go to the layer above.  The block's forward is two lines on purpose.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dualroute.attention.compiled import new_choice
from dualroute.attention.core.layout import Layout
from dualroute.attention.core.rope import RopeScaling
from dualroute.attention.core.routing import SharedChoice
from dualroute.attention.layer import DualRouting
from dualroute.model.config import ModelConfig, PartsConfig


def norm_of(config: ModelConfig) -> nn.RMSNorm | nn.LayerNorm:
    """A norm of the residual stream: RMSNorm, or what `ModelConfig.parts` says."""
    if config.parts is not None and config.parts.norm == "layer":
        return nn.LayerNorm(config.dim, eps=config.norm_eps, bias=False)
    return nn.RMSNorm(config.dim, eps=config.norm_eps)


class SwiGLU(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) · up(x)) (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    Args:
        dim: Width of the residual stream.
        ffn_dim: Inner width.
        gelu: Take GELU instead of SiLU.
    """

    def __init__(self, dim: int, ffn_dim: int, *, gelu: bool = False) -> None:
        super().__init__()
        self.gelu = gelu
        self.gate = nn.Linear(dim, ffn_dim, bias=False)
        self.up = nn.Linear(dim, ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, n, dim) → (B, n, dim)."""
        return self.down_project(self.gate(hidden_states), self.up(hidden_states))

    def down_project(self, gate: Tensor, up: Tensor) -> Tensor:
        """What follows the two products, (…, ffn_dim) each → (…, dim)."""
        return self.down((F.gelu(gate) if self.gelu else F.silu(gate)) * up)


def shared_choices(
    layers: int, groups: list[list[int]], layout: Layout | None = None
) -> list[SharedChoice | None]:
    """Of one forward pass, for each layer: what it shares with others, by ``ModelConfig.choice_groups``.

    ``layout`` is the batch's, where a graph may be recorded.
    """
    choices: list[SharedChoice | None] = [None] * layers
    for number, group in enumerate(groups):
        choice = SharedChoice() if layout is None else new_choice(layout, number)
        for layer in group:
            choices[layer] = choice
    return choices


class TransformerBlock(nn.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.ffn_dim is not None
        parts = config.parts or PartsConfig()
        self.attention_norm = norm_of(config) if parts.first_norm else nn.Identity()
        self.attention = DualRouting(
            config.dim,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            global_heads=config.global_heads,
            local_heads=config.local_heads,
            window=config.window,
            global_mode="full" if config.attention == "dense" else config.global_mode,
            auto_break_even=config.auto_break_even,
            block=config.block,
            top_k=config.top_k,
            router=config.router,
            sub_block=config.sub_block,
            far_summary=config.far_summary,
            cluster_span=config.cluster_span,
            causal=config.causal,
            grid=config.grid,
            rope_theta=config.rope_theta,
            rope_scaling=None if config.rope_scaling is None else RopeScaling(**config.rope_scaling),
            global_rotary_factor=config.global_rotary_factor,
            local_rotary_factor=config.local_rotary_factor,
            qkv_bias=config.qkv_bias,
            qk_norm=config.qk_norm,
            gate=config.gate,
        )
        self.ffn_norm = norm_of(config)
        self.ffn = SwiGLU(config.dim, config.ffn_dim, gelu=parts.activation == "gelu")

    def forward(self, hidden_states: Tensor, **attention: Any) -> Tensor:
        """(B, n, dim) → (B, n, dim); ``attention`` holds layout, positions, cache and choice for the
        attention."""
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), **attention)
        return hidden_states + self.ffn(self.ffn_norm(hidden_states))
