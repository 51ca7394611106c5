"""How tokens are drawn: the options of sampling.  No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from dualroute.settings import SEEDS, above, at_least, check_fields


@dataclass
class SamplingConfig:
    """How the next token is drawn.

    Args:
        max_new_tokens: Tokens to generate at most.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep only this many most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches this (nucleus sampling).
        seed: Seed of the draw; the same seed gives the same text.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {"max_new_tokens": at_least(1), "top_p": above(0, 1), "seed": SEEDS}
        check_fields(self, "sampling", ranges)
