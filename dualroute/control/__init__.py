"""What is written, told by texts: stops, banned and required words, grammars.

The sampler of :mod:`dualroute.model.decoding` knows ids alone; here the tokenizer comes in.
:func:`new_sampler` makes the sampler of one text from the options, and :class:`TextStream` turns its tokens
into whole characters.  ``generate``, ``chat`` and whatever else writes use these two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dualroute.control.grammar import GrammarConstraint, grammar_of
from dualroute.control.text_stream import TextStream
from dualroute.control.words import BannedTexts, RequiredTexts
from dualroute.data.tokenizer import Tokenizer
from dualroute.model.decoding.sampler import Constraint, Sampler
from dualroute.model.decoding.sampling_config import SamplingConfig

__all__ = ["TextStream", "new_sampler"]


def new_sampler(
    sampling: SamplingConfig,
    tokenizer: Tokenizer,
    prompt: Sequence[int] = (),
    *,
    generator: torch.Generator | None = None,
) -> Sampler:
    """The sampler of one text.

    Args:
        sampling: Its options.
        tokenizer: The model's.
        prompt: Ids that the text begins with.
        generator: See :class:`Sampler`.

    Raises:
        UserError: A grammar cannot be read or used, or its library is missing.
    """
    constraints: list[Constraint] = []
    if sampling.required:  # first: it may decide alone, and the others then have the last word
        constraints.append(RequiredTexts(tokenizer, sampling.required))
    if sampling.banned:
        constraints.append(BannedTexts(tokenizer, sampling.banned))
    if sampling.required and sampling.stop:
        constraints.append(BannedTexts(tokenizer, sampling.stop, until=constraints[0]))
    if sampling.grammar_name is not None:
        constraints.append(GrammarConstraint(tokenizer, grammar_of(sampling)))
    return Sampler(sampling, prompt, constraints=constraints, generator=generator)
