"""How tokens are drawn: the options of sampling.  No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field

from dualroute.errors import UserError
from dualroute.paths import LocalPath
from dualroute.settings import SEEDS, Range, above, at_least, check_fields

#: Alternatives whose log-probabilities are kept for each token, at most.
MOST_LOGPROBS = 100


@dataclass
class SamplingConfig:
    """How the next token is drawn.

    Args:
        max_new_tokens: Tokens to generate at most.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep only this many most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches this (nucleus sampling).
        seed: Seed of the draw; the same seed gives the same text.
        min_p: Keep tokens at least this share as likely as the most likely one; 0 keeps all.
        repetition_penalty: Logits of tokens that the prompt or the text holds are divided by this where they
            are positive, and multiplied where they are negative; 1 changes nothing.
        presence_penalty: Taken once from the logit of each token that was written before.
        frequency_penalty: Taken from a token's logit for each time that it was written before.
        stop: Texts at which writing ends; they are not part of what is written.
        banned: Texts that are not written, not inside a longer word either.
        required: Texts that what is written must hold before it may end.
        json_schema: File with a JSON schema that what is written must fit (extra: control).
        regex: Regular expression that what is written must fit as a whole (extra: control).
        grammar: File with a grammar in the notation of Lark that what is written must fit (extra: control).
        logprobs: Keep the log-probability of each token and of this many alternatives; null keeps none.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: list[str] = field(default_factory=list)
    banned: list[str] = field(default_factory=list)
    required: list[str] = field(default_factory=list)
    json_schema: LocalPath | None = None
    regex: str | None = None
    grammar: LocalPath | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": at_least(1),
            "top_p": above(0, 1),
            "min_p": at_least(0, 1),
            "repetition_penalty": above(0, 10),
            "presence_penalty": Range(-10, 10),
            "frequency_penalty": Range(-10, 10),
            "seed": SEEDS,
            "logprobs": at_least(0, MOST_LOGPROBS),
        }
        check_fields(self, "sampling", ranges)
        for name in ("stop", "banned", "required"):
            if "" in getattr(self, name):
                raise UserError(f"sampling.{name} holds an empty text: leave it out")
        grammars = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        if len(grammars) > 1:
            raise UserError(f"sampling.{' and sampling.'.join(grammars)} cannot both hold: give one of them")
        if grammars and self.required:
            raise UserError(
                f"sampling.required does not go with sampling.{grammars[0]}, which alone decides what is "
                f"written: make the words part of it"
            )
        for forbidden in ("banned", "stop"):
            for text in getattr(self, forbidden):
                inside = next((word for word in self.required if text in word), None)
                if inside is not None:
                    raise UserError(
                        f"sampling.{forbidden} holds {text!r}, which is part of {inside!r} in "
                        f"sampling.required: take one of them out"
                    )

    @property
    def reads_text(self) -> bool:
        """Whether tokens are chosen by what they spell, for which the tokenizer is needed."""
        return bool(self.stop or self.banned or self.required or self.grammar_name)

    @property
    def grammar_name(self) -> str | None:
        """Which of the three kinds of grammar is given."""
        return next(
            (name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None), None
        )

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)
