"""The sampler: logits in, the next token out, for one text.

:mod:`~dualroute.model.decoding.generation` and a chat draw through it, each text with a sampler of its own:
penalties, then constraints, then temperature, top-k, top-p and min-p, then a uniform number of the text's own
random generator.  So a text does not depend on what else is written beside it, and drawing samples during
training changes no training step.  It runs on the CPU, outside of whatever program computes the logits.

Constraints that know what tokens spell (words, grammars) are in :mod:`dualroute.control`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dualroute.errors import UserError
from dualroute.model.decoding.sampling_config import SamplingConfig

#: Below this temperature the likeliest token is all that is left, and float32 would overflow.
COLDEST = 1e-6
NUCLEUS = 1024  # tokens in which the nucleus of top_p is looked for first


class Constraint(Protocol):
    """Says which tokens may come next; one object for one text."""

    def restrict(self, logits: Tensor, room: int) -> None:
        """Set those of (V,) float32 logits to -inf, in place, that may not come next.

        ``room`` tokens may still be written, this one included.
        """

    def accept(self, token: int) -> None:
        """The token was written."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing more may follow, not even what ends a text."""


@dataclass(frozen=True)
class TokenLogprob:
    """What the model said of a token that was written.

    Attributes:
        token: Its id.
        logprob: Natural logarithm of its probability by the model alone: temperature 1, no penalty or
            constraint.
        top: (id, log-probability) of the most likely tokens there, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Draws the tokens of one text.

    Args:
        sampling: How; see :class:`SamplingConfig`.
        prompt: Ids that the text begins with, for the repetition penalty.
        constraints: Of this text alone.
        room: Tokens that may be written; by default ``sampling.max_new_tokens``.
        generator: Of random numbers, on the CPU; by default one seeded with ``sampling.seed``.

    Attributes:
        written: Ids drawn so far.
        logprobs: One for each of them, with ``sampling.logprobs``.
        room: Tokens that may still be written.

    Raises:
        ValueError: ``sampling`` has words, stops or a grammar, and nothing is given that reads texts.
    """

    def __init__(
        self,
        sampling: SamplingConfig,
        prompt: Sequence[int] = (),
        *,
        constraints: Sequence[Constraint] | None = None,
        room: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if constraints is None and sampling.reads_text:
            raise ValueError(
                "sampling has stop, banned or required texts or a grammar, which need the tokenizer: "
                "make the sampler by dualroute.control.new_sampler"
            )
        self.sampling, self.constraints = sampling, tuple(constraints or ())
        self.room = sampling.max_new_tokens if room is None else room
        self.generator = generator or torch.Generator().manual_seed(sampling.seed)
        self.written: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self._prompt = tuple(prompt) if sampling.repetition_penalty != 1 else ()
        self._counts = torch.empty(0)  # (V,) how often each token was written
        self._seen = torch.empty(0, dtype=torch.bool)  # (V,) whether the prompt or the text holds it

    @property
    def is_finished(self) -> bool:
        """Whether nothing may follow."""
        return self.room <= 0 or any(constraint.is_finished for constraint in self.constraints)

    def draw(self, logits: Tensor) -> int:
        """The next token for the model's logits (V,).

        Raises:
            UserError: Penalties and constraints leave no token, or the logits are no numbers.
        """
        raw = logits.float()
        chosen = draw(self.adjusted(raw), self.sampling, self.generator)
        if self.sampling.logprobs is not None:
            self.logprobs.append(_token_logprob(raw, chosen, self.sampling.logprobs))
        for constraint in self.constraints:
            constraint.accept(chosen)
        if self._counts.numel():
            self._counts[chosen] += 1
            self._seen[chosen] = True
        self.written.append(chosen)
        self.room -= 1
        return chosen

    def adjusted(self, logits: Tensor) -> Tensor:
        """Logits (V,) after penalties and constraints, -inf where a token may not come next."""
        sampling = self.sampling
        if sampling.has_penalties:
            if not self._counts.numel():
                self._counts = logits.new_zeros(logits.shape)
                self._seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
                self._seen[list(self._prompt)] = True
            # Keskar et al. 2019, https://arxiv.org/abs/1909.05858, §4.1
            weaker = torch.where(
                logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty
            )
            logits = torch.where(self._seen, weaker, logits)
            logits = logits - sampling.presence_penalty * (self._counts > 0)
            logits = logits - sampling.frequency_penalty * self._counts
        if self.constraints:
            logits = logits.clone()
            for constraint in self.constraints:
                constraint.restrict(logits, self.room)
            if not bool((logits > -torch.inf).any()):
                raise UserError(
                    "no token may come next: the words and the grammar of sampling contradict each other "
                    "after what was written; loosen one of them"
                )
        return logits


def _token_logprob(logits: Tensor, token: int, alternatives: int) -> TokenLogprob:
    logprobs = torch.log_softmax(logits, -1)
    best = logprobs.topk(min(alternatives, logits.numel()))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)


def next_tokens(logits: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Tokens that may come next: (V,) logits → their ids and float32 probabilities, (m,), whose sum is 1."""
    logits = logits.float()
    if sampling.temperature < COLDEST:
        return logits.argmax().view(1), logits.new_ones(1)
    ids = torch.arange(logits.numel(), device=logits.device)
    if 0 < sampling.top_k < logits.numel():
        logits, ids = logits.topk(sampling.top_k)
    probabilities = torch.softmax(logits / sampling.temperature, -1)
    if sampling.top_p < 1:
        # sorting a large vocabulary takes longer than a small model's step: begin with the most likely ones
        kept = count = 0
        while kept == count < ids.numel():
            count = min(8 * count or NUCLEUS, ids.numel())
            ordered, order = probabilities.topk(count)
            # a token stays while the mass *before* it has not reached top_p: the most likely always stays
            kept = max(int((ordered.cumsum(0) - ordered < sampling.top_p).sum()), 1)  # 1e-50 is 0 in float32
        ids, probabilities = ids[order[:kept]], ordered[:kept]
    if sampling.min_p > 0:  # Nguyen et al. 2024, https://arxiv.org/abs/2407.01082
        likely = probabilities >= sampling.min_p * probabilities.max()
        ids, probabilities = ids[likely], probabilities[likely]
    return ids, probabilities / probabilities.sum()


def draw(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """The next token for (V,) logits: where a uniform number falls among the summed probabilities."""
    if sampling.temperature < COLDEST:
        return int(logits.max(0).indices)  # twice as fast as argmax on a CPU
    ids, probabilities = next_tokens(logits, sampling)
    if ids.numel() == 1:
        return int(ids)
    summed = probabilities.double().cumsum(0)
    # below 1, so that the place is below the sum: a token of probability 0 is never met
    place = summed[-1] * torch.rand(1, generator=generator, dtype=torch.double)
    return int(ids[torch.searchsorted(summed, place, right=True).clamp_max(ids.numel() - 1)])
