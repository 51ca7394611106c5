"""How tokens are drawn: the options of sampling.  No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from dualroute.errors import UserError


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
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: it must be at least 1")
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}: it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: it must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must be in (0, 1]")
