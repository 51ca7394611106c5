"""The options of ``dualroute inspect``.  No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dualroute.paths import LocalPath
from dualroute.settings import at_least, check_fields

#: Tokens of a text, at most: weights of every pair of them are held for a few heads at a time.
MOST_TOKENS = 4096


@dataclass
class InspectConfig:
    """Show what a model reads in a text.

    Args:
        checkpoint: A run folder (its newest finished checkpoint) or a checkpoint folder.
        text: The text itself; "-" reads it from standard input.
        output: HTML page to write.
        max_tokens: Tokens that are shown; what follows them is left out, and a line says so.  At most 4096.
        ablations: What is switched off, one thing at a time, each at the cost of a pass over the text: routes
            (of all layers, of each), heads, layers, blocks (read by nobody any more); [] for nothing.
        device: auto, cpu, cuda, ….
        dtype: Arithmetic of the model; auto is float32, or what the kernels of its weights need.
        scale: Heads to switch off or to scale first, as ROUTE.LAYER.HEAD=FACTOR with commas between.
    """

    checkpoint: LocalPath
    text: str
    output: LocalPath
    max_tokens: int = 512
    ablations: list[Literal["routes", "heads", "layers", "blocks"]] = field(
        default_factory=lambda: ["routes", "heads", "layers", "blocks"]
    )
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    scale: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "", {"max_tokens": at_least(2, MOST_TOKENS)})
