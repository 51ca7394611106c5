"""The options of `DualRouting`: defaults that depend on each other, and one line for each mistake.

In: numbers and names as a configuration gives them. Out: the complete numbers, or a `ValueError` that names
the key, its value and the remedy. One of global_heads and local_heads is enough, the
other is the rest.
"""

from __future__ import annotations

import difflib


def check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}={value} is too small: it must be at least {least}")


def check_name(key: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        nearest = difflib.get_close_matches(str(value), names, n=1, cutoff=0.0)[0]
        raise ValueError(f"{key}={value} is unknown: did you mean {nearest}? Valid are {', '.join(names)}")


def resolve_head_dim(dim: int, num_heads: int, head_dim: int | None) -> int:
    if head_dim is None:
        if dim % num_heads:
            raise ValueError(
                f"dim={dim} is not a multiple of num_heads={num_heads}: change one, or give head_dim"
            )
        head_dim = dim // num_heads
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even and at least 2: the rotary embedding turns pairs")
    return head_dim


def resolve_heads(num_heads: int, global_heads: int | None, local_heads: int | None) -> tuple[int, int]:
    if global_heads is None and local_heads is None:
        if num_heads % 2:
            raise ValueError(
                f"num_heads={num_heads} is odd: give global_heads and local_heads, or an even number"
            )
        return num_heads // 2, num_heads // 2
    if global_heads is None:
        global_heads = num_heads - (local_heads or 0)
    elif local_heads is None:
        local_heads = num_heads - global_heads
    assert local_heads is not None
    if min(global_heads, local_heads) < 0 or global_heads + local_heads == 0:
        raise ValueError(
            f"global_heads={global_heads} and local_heads={local_heads} with num_heads={num_heads}: "
            "neither may be negative, and one must be at least 1"
        )
    return global_heads, local_heads


def resolve_group(num_heads: int, num_kv_heads: int | None) -> int:
    """Query heads per key head."""
    if num_kv_heads is None:
        return 1
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}: choose a divisor"
        )
    return num_heads // num_kv_heads
