"""The options of the attention: defaults that depend on each other, and one line for each mistake.

In: numbers and names as a configuration gives them. Out: the complete numbers, or a `ValueError` that names
the key, its value and the remedy. `DualRouting` and the configuration of a model both ask here, so that one
accepts exactly what the other can build. Nothing here needs torch.
"""

from __future__ import annotations

import difflib
import math
from typing import NamedTuple

GLOBAL_MODES = ("auto", "full", "routed")
ROUTERS = ("minmax", "moment", "mean")
FAR_SUMMARIES = ("second_order", "first_order", "none")
CACHE_DTYPES = ("auto", "int8", "int4")

# global_mode="auto" routes documents longer than this many tokens by default. In plain torch, which GPUs run,
# routed and full are equally fast there (whole training steps of the 5m preset, benchmarks/train_step.py).
# The C++ kernels break even below 1024; but what a model reads must not depend on the kernels of a machine.
AUTO_BREAK_EVEN = 2048


class Heads(NamedTuple):
    """How the heads are divided: `group` query heads share a key head, on both routes."""

    head_dim: int
    group: int
    global_heads: int
    local_heads: int


def check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}={value} is too small: it must be at least {least}")


def check_name(key: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        nearest = difflib.get_close_matches(str(value), names, n=1, cutoff=0.0)[0]
        raise ValueError(f"{key}={value} is unknown: did you mean {nearest}? Valid are {', '.join(names)}")


def check_routes(
    *,
    window: int,
    global_mode: str,
    auto_break_even: int,
    block: int,
    top_k: int,
    router: str,
    sub_block: int,
    far_summary: str,
    rope_theta: float,
    cluster_span: int = 0,
    causal: bool = True,
) -> None:
    """What the routes read; see `DualRouting` for the keys.

    Raises:
        ValueError: one is out of range, or contradicts another one.
    """
    check_at_least(1, window=window, block=block, sub_block=sub_block, auto_break_even=auto_break_even)
    check_at_least(0, top_k=top_k, cluster_span=cluster_span)
    check_name("global_mode", global_mode, GLOBAL_MODES)
    check_name("router", router, ROUTERS)
    check_name("far_summary", far_summary, FAR_SUMMARIES)
    if router == "minmax" and block % sub_block:
        raise ValueError(
            f"block={block} is not a multiple of sub_block={sub_block}, which the minmax router needs: "
            f"use block={-(-block // sub_block) * sub_block}, another sub_block, or router=moment"
        )
    if cluster_span:
        check_clusters(cluster_span, block, sub_block if router == "minmax" else block, causal)
    if not (math.isfinite(rope_theta) and rope_theta > 0):
        raise ValueError(f"rope_theta={rope_theta} must be a finite number above 0")


def rotary_channels(head_dim: int, factor: float) -> int:
    """Channels of a head that the rotary embedding turns."""
    return round(head_dim * factor)


def check_rotary(head_dim: int, *, grid: bool = False, **factors: float) -> None:
    """Which share of a head's channels the rotary embedding turns: 1 all of them, 0 none.

    Args:
        head_dim: channels of a head.
        grid: the heads read images, whose two axes turn half of these channels each.
        factors: by the name of the option.

    Raises:
        ValueError: one is out of range, or no whole number of pairs of channels.
    """
    step = 4 if grid else 2
    for name, factor in factors.items():
        if not 0 <= factor <= 1:
            raise ValueError(f"{name}={factor} is a share of the channels: give a number from 0 to 1")
        channels = rotary_channels(head_dim, factor)
        if channels % step or abs(channels - head_dim * factor) > 1e-6 * head_dim:
            nearest = min(range(0, head_dim + 1, step), key=lambda count: abs(count - head_dim * factor))
            of_grid = ", as the two axes of an image need" if grid else ""
            raise ValueError(
                f"{name}={factor} of head_dim={head_dim} is {head_dim * factor:g} channels, no multiple of "
                f"{step}{of_grid}: use {nearest / head_dim:g}, which is {nearest}"
            )


def check_clusters(cluster_span: int, block: int, cell: int, causal: bool) -> None:
    """Whether a span of `cluster_span` tokens is blocks, and can be halved into cells of `cell` keys.

    Raises:
        ValueError: it cannot, or there is no past.
    """
    if not causal:
        raise ValueError(f"cluster_span={cluster_span} with causal=False: no span is past there, use 0")
    if not _is_power_of_two(block, cell):
        raise ValueError(
            f"cluster_span={cluster_span} halves spans down to cells of sub_block={cell} keys: block={block} "
            f"must be {cell} times 1, 2, 4, ...; change one of them, or use cluster_span=0"
        )
    if not _is_power_of_two(cluster_span, block):
        nearest = block << max(0, round(math.log2(cluster_span / block)))
        raise ValueError(
            f"cluster_span={cluster_span} is not block={block} times 1, 2, 4, ...: use {nearest}, or 0"
        )


def _is_power_of_two(value: int, unit: int) -> bool:
    """Whether it is `unit` times a power of two."""
    times, rest = divmod(value, unit)
    return times > 0 and rest == 0 and times & (times - 1) == 0


def resolve_heads(
    *,
    dim: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    global_heads: int | None = None,
    local_heads: int | None = None,
) -> Heads:
    """The complete numbers of heads; None stands for a default.

    num_kv_heads is one per query head by default, head_dim is dim / num_heads. Of global_heads and
    local_heads, one is enough: the other is the rest. With neither, the global route has half of the key
    heads, rounded down, with the query heads that share them.

    Raises:
        ValueError: one is out of range, or contradicts another one.
    """
    check_at_least(1, dim=dim, num_heads=num_heads)
    if head_dim is None:
        if dim % num_heads:
            raise ValueError(
                f"dim={dim} is not a multiple of num_heads={num_heads}: change one, or give head_dim"
            )
        head_dim = dim // num_heads
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even and at least 2: the rotary embedding turns pairs")
    if num_kv_heads is None:
        num_kv_heads = num_heads
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}: choose a divisor"
        )
    group = num_heads // num_kv_heads
    if global_heads is None and local_heads is None:
        global_heads = num_kv_heads // 2 * group
        if global_heads == 0:
            raise ValueError(
                f"num_heads={num_heads} with num_kv_heads={num_kv_heads} cannot be halved: there is one key "
                f"head for two routes; give more num_kv_heads, or global_heads and local_heads"
            )
    if global_heads is None:
        global_heads = num_heads - (local_heads or 0)
    if local_heads is None:
        local_heads = num_heads - global_heads
    if min(global_heads, local_heads) < 0 or global_heads + local_heads == 0:
        raise ValueError(
            f"global_heads={global_heads} and local_heads={local_heads} with num_heads={num_heads}: "
            "neither may be negative, and one must be at least 1"
        )
    for name, heads in (("global_heads", global_heads), ("local_heads", local_heads)):
        if heads % group:
            raise ValueError(
                f"{name}={heads} is not a multiple of {group}, the query heads per key head "
                f"(num_heads={num_heads} / num_kv_heads={num_kv_heads}): change one of them"
            )
    return Heads(head_dim, group, global_heads, local_heads)
