"""The schemes in which weights are stored, and what a checkpoint says of its own.

No torch is imported here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

SchemeName = Literal[
    "int8_weight_only", "int8_dynamic", "int4_weight_only", "int4_tile_packed", "float8_dynamic"
]


#: schemes whose weights are tensors of torchao, laid out for the kernels of a GPU
NATIVE = ("int4_tile_packed", "float8_dynamic")


#: schemes that share a scale among group_size columns
GROUPED = ("int4_weight_only", "int4_tile_packed")


@dataclass(frozen=True)
class Quantization:
    """What ``checkpoint.json`` says of the weights.

    Args:
        scheme: How the linear layers are stored and multiplied.
        group_size: Columns that share a scale; null where a row has one.
        embeddings: Whether embedding and head are int8, a scale a row.
        tensors: Of a native scheme, what torchao wants to know to put its tensors together again.
    """

    scheme: SchemeName
    group_size: int | None = None
    embeddings: bool = True
    tensors: dict[str, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for ``checkpoint.json``."""
        return asdict(self)
