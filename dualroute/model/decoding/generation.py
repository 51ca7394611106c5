"""Generation: prompts' ids in, new ids out.

A prompt is read once into the caches, each further token costs one step of the model.  What comes next is
drawn by the text's own :class:`~dualroute.model.decoding.sampler.Sampler`, so a text is the same alone and
beside others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dualroute.model.decoding.cache_options import DEFAULT, CacheOptions
from dualroute.model.decoding.sampler import Sampler
from dualroute.model.decoding.sampling_config import SamplingConfig
from dualroute.model.transformer import DualRoutingTransformer

Decoder = Callable[[Tensor, list[Any]], Tensor]


def generate(
    model: DualRoutingTransformer,
    prompt: list[int],
    sampling: SamplingConfig,
    eos_id: int | Collection[int] | None = None,
    decoder: Decoder | None = None,
    cache: CacheOptions = DEFAULT,
    sampler: Sampler | None = None,
) -> Iterator[int]:
    """Yield new token ids after ``prompt`` until ``eos_id`` (any of them, if several), ``max_new_tokens`` or
    the model's context.

    ``decoder(tokens, caches)`` gives the logits (B, V) after tokens (B, n); null asks the model itself.
    ``cache`` says how keys and values are kept.  ``sampler`` draws instead of one made of ``sampling``.

    Raises:
        ValueError: The prompt is empty, or leaves no room in the model's context, or ``sampling`` reads texts
            and no sampler does.
        UserError: The model is not causal, or nothing may come next.
    """
    sampler = sampler or Sampler(sampling, prompt)
    for _, token in generate_batch(model, [prompt], [sampler], eos_id, decoder, cache):
        yield token


@torch.no_grad()
def generate_batch(
    model: DualRoutingTransformer,
    prompts: Sequence[list[int]],
    samplers: Sequence[Sampler],
    eos_id: int | Collection[int] | None = None,
    decoder: Decoder | None = None,
    cache: CacheOptions = DEFAULT,
) -> Iterator[tuple[int, int]]:
    """Yield (number of a prompt, its next token), each prompt until its own end as in :func:`generate`.

    Prompts of equal length are read and continued together; each draws by its own sampler, so what it becomes
    does not depend on the others.  A caller that needs no more of a prompt sets its ``sampler.room`` to 0.

    Raises:
        ValueError, UserError: As in :func:`generate`.
    """
    model.config.require_causal("generation")
    limit = model.config.max_context
    for prompt in prompts:
        if not prompt:
            raise ValueError("the prompt is empty: give at least the <bos> token")
        if len(prompt) >= limit:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens; the model reads at most {limit}: shorten it"
            )
    ends = {eos_id} if eos_id is None or isinstance(eos_id, int) else set(eos_id)
    was_training = model.training
    model.eval()
    try:
        for length in sorted({len(prompt) for prompt in prompts}):
            rows = [number for number, prompt in enumerate(prompts) if len(prompt) == length]
            of_rows = [samplers[number] for number in rows]
            for sampler in of_rows:
                sampler.room = min(sampler.room, limit - length)
            tokens = torch.tensor([prompts[number] for number in rows])
            for row, token in _continue_rows(model, tokens, of_rows, ends, decoder, cache):
                yield rows[row], token
    finally:
        model.train(was_training)


def _continue_rows(
    model: DualRoutingTransformer,
    tokens: Tensor,
    samplers: Sequence[Sampler],
    ends: Collection[int | None],
    decoder: Decoder | None,
    cache: CacheOptions,
) -> Iterator[tuple[int, int]]:
    """(row, next token) of prompts (B, n)."""
    device = model.norm.weight.device  # the embedding may be quantised
    batch, length = tokens.shape
    caches = model.new_caches(batch, length + max(sampler.room for sampler in samplers), **cache._asdict())
    fed = tokens.to(device)
    waiting = [row for row, sampler in enumerate(samplers) if not sampler.is_finished]
    while waiting:
        if decoder is None:
            logits = model.head(model.hidden_states(fed, caches=caches)[:, -1])
        else:
            logits = decoder(fed, caches)
        # drawn on the CPU: the same seed gives the same text on every device
        logits = logits.cpu()
        following = [0] * batch  # rows that have ended are fed anything
        for row in list(waiting):
            token = following[row] = samplers[row].draw(logits[row])
            if token in ends:
                samplers[row].room = 0
            yield row, token
            if samplers[row].is_finished:  # also where the caller says so
                waiting.remove(row)
        fed = torch.tensor(following, device=device)[:, None]


@torch.no_grad()
def continue_batch(
    model: DualRoutingTransformer,
    prompts: Tensor,
    new_tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> Tensor:
    """Prompts of equal length with ``new_tokens`` more ids each, drawn from the model: (B, n) → (B, n + m).

    Always that many, also past an end of the text, so that ranks which hold parts of one model take as many
    steps.  With a CPU's ``generator`` the draws are the same on every device; with one of the prompts' device
    nothing leaves it.  Either way the host never waits for a GPU.

    Raises:
        ValueError: The texts would be longer than the model's context.
        UserError: The model is not causal.
    """
    model.config.require_causal("generation")
    batch, length = prompts.shape
    if not length or length + new_tokens > model.config.max_context:
        raise ValueError(
            f"{length} + {new_tokens} tokens do not fit: a prompt needs one, and the model reads at most "
            f"{model.config.max_context}"
        )
    was_training = model.training
    model.eval()
    try:
        caches = model.new_caches(batch, length + new_tokens)
        texts, fed = prompts, prompts
        for _ in range(new_tokens):
            logits = model.head(model.hidden_states(fed, caches=caches)[:, -1]).float()  # (B, V)
            # the largest of p / Exp(1) is a draw from p, as torch.multinomial makes it, but without its check
            # of p, for which a GPU is waited for
            noise = torch.empty(logits.shape, device=generator.device).exponential_(1, generator=generator)
            likely = torch.softmax(logits / temperature, -1)
            fed = (likely / noise.to(likely.device, non_blocking=True)).argmax(-1, keepdim=True)
            texts = torch.cat([texts, fed], 1)
    finally:
        model.train(was_training)
    return texts
