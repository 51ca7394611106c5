"""How a text's cache is kept."""

from __future__ import annotations

from typing import NamedTuple


class CacheOptions(NamedTuple):
    """Of `DualRoutingTransformer.new_caches`.

    Args:
        cache_dtype: How complete blocks of the global route are kept: auto (as the model), int8 or int4.
        cache_offload: A folder, or host, where their keys and values lie; null: with all else.
    """

    cache_dtype: str = "auto"
    cache_offload: str | None = None


DEFAULT = CacheOptions()
