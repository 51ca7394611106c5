"""Texts that a model writes after prompts: greedy decoding of prompts of one length at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dualroute.data.tokenizer import Tokenizer
from dualroute.model import DualRoutingTransformer

#: Prompts that are continued together.
TOGETHER = 32


@torch.no_grad()
def write_texts(
    model: DualRoutingTransformer, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[str]:
    """The likeliest continuation of each prompt, token by token, to the end of text or ``max_new_tokens``.

    Prompts of one length share the forward passes; none is padded, so that no text depends on its company.
    """
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(number)
    texts = [""] * len(prompts)
    for numbers in by_length.values():
        for first in range(0, len(numbers), TOGETHER):
            some = numbers[first : first + TOGETHER]
            for number, ids in zip(
                some,
                _continued(model, [prompts[k] for k in some], max_new_tokens, tokenizer.eos_ids),
                strict=True,
            ):
                texts[number] = tokenizer.decode(ids).strip()
    return texts


def _continued(
    model: DualRoutingTransformer, prompts: list[list[int]], max_new_tokens: int, eos_ids: Sequence[int]
) -> list[list[int]]:
    device = model.norm.weight.device
    length = len(prompts[0])
    new = max(min(max_new_tokens, model.config.max_context - length), 0)
    caches = model.new_caches(len(prompts), length + new)
    fed = torch.tensor(prompts, device=device)
    written: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for _ in range(new):
        logits = model.head(model.hidden_states(fed, caches=caches)[:, -1])  # (B, V)
        chosen = logits.argmax(-1)
        for k, token in enumerate(chosen.tolist()):
            done[k] = done[k] or token in eos_ids
            if not done[k]:
                written[k].append(token)
        if all(done):
            break
        fed = chosen[:, None]
    return written
