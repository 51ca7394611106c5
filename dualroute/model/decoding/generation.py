"""Sampling: a prompt's ids in, one new id at a time out.

The prompt is read once into the caches, each further token costs one step of the model.  Temperature, then
top-k, then top-p are applied in that order, as in Hugging Face's ``generate``.  Sampling
has a random generator of its own, so drawing samples during training changes no training step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from dualroute.model.decoding.sampling_config import SamplingConfig
from dualroute.model.transformer import DualRoutingTransformer

Decoder = Callable[[Tensor, list[Any]], Tensor]

NUCLEUS = 1024  # tokens in which the nucleus of top_p is looked for first


def next_tokens(logits: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Tokens that may come next: (V,) logits → their ids and float32 probabilities, (m,), whose sum is 1."""
    logits = logits.float()
    if sampling.temperature == 0:
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
            kept = int((ordered.cumsum(0) - ordered < sampling.top_p).sum())
        ids, probabilities = ids[order[:kept]], ordered[:kept]
    return ids, probabilities / probabilities.sum()


def draw(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """The next token for (V,) logits: where a uniform number falls among the summed probabilities."""
    if sampling.temperature == 0:
        return int(logits.max(0).indices)  # twice as fast as argmax on a CPU
    ids, probabilities = next_tokens(logits, sampling)
    if ids.numel() == 1:
        return int(ids)
    summed = probabilities.double().cumsum(0)
    place = summed[-1] * torch.rand(1, generator=generator, dtype=torch.double)
    return int(ids[torch.searchsorted(summed, place, right=True).clamp_max(ids.numel() - 1)])


@torch.no_grad()
def generate(
    model: DualRoutingTransformer,
    prompt: list[int],
    sampling: SamplingConfig,
    eos_id: int | Collection[int] | None = None,
    decoder: Decoder | None = None,
    cache_dtype: str = "auto",
    cache_offload: str | None = None,
) -> Iterator[int]:
    """Yield new token ids after ``prompt`` until ``eos_id`` (any of them, if several), ``max_new_tokens`` or
    the model's context.

    ``decoder(tokens, caches)`` gives the logits (1, V) after tokens (1, n); null asks the model itself.
    ``cache_dtype`` is how complete blocks of the global route are kept: auto (as the model), int8 or int4;
    ``cache_offload`` a folder, or host, where its keys and values lie.

    Raises:
        ValueError: The prompt is empty, or leaves no room in the model's context.
        UserError: The model is not causal, or the folder cannot be used, or is full.
    """
    model.config.require_causal("generation")
    limit = model.config.max_context
    if not prompt:
        raise ValueError("the prompt is empty: give at least the <bos> token")
    if len(prompt) >= limit:
        raise ValueError(f"the prompt has {len(prompt)} tokens; the model reads at most {limit}: shorten it")
    ends = {eos_id} if eos_id is None or isinstance(eos_id, int) else set(eos_id)
    device = model.norm.weight.device  # the embedding may be quantised
    generator = torch.Generator().manual_seed(sampling.seed)
    length = min(len(prompt) + sampling.max_new_tokens, limit)
    was_training = model.training
    model.eval()
    try:
        caches = model.new_caches(1, length, cache_dtype=cache_dtype, cache_offload=cache_offload)
        fed = torch.tensor([prompt], device=device)
        for _ in range(length - len(prompt)):
            if decoder is None:
                logits = model.head(model.hidden_states(fed, caches=caches)[0, -1])
            else:
                logits = decoder(fed, caches)[0]
            # drawn on the CPU: the same seed gives the same text on every device
            token = draw(logits.cpu(), sampling, generator)
            yield token
            if token in ends:
                return
            fed = torch.tensor([[token]], device=device)
    finally:
        model.train(was_training)


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
