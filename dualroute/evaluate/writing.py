"""Texts that a model writes after prompts: greedy decoding of prompts of one length at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch

from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.model.foreign.hub import CausalLM

#: Prompts that are continued together.
TOGETHER = 32


@torch.no_grad()
def write_texts(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    *,
    together: int = TOGETHER,
) -> list[str]:
    """The likeliest continuation of each prompt, token by token, to the end of text or ``max_new_tokens``,
    without white space around it."""
    written = write_ids(model, prompts, max_new_tokens, tokenizer.eos_ids, together=together)
    return [tokenizer.decode(ids).strip() for ids in written]


@torch.no_grad()
def write_ids(
    model: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    *,
    ended: Callable[[list[int]], bool] | None = None,
    together: int = TOGETHER,
) -> list[list[int]]:
    """The likeliest continuation of each prompt as ids, without the one that ended it.

    Prompts of one length share the forward passes; none is padded, so that no text depends on its company.

    Args:
        model: A `CausalLM`; one without caches (a GPT-2) reads the whole text again for each token.
        prompts: Ids.
        max_new_tokens: At most; the model's context may leave less.
        eos_ids: Ids that end a text.
        ended: Whether a text may end with these ids, asked after each token.
        together: Prompts in one forward pass.

    Raises:
        UserError: The model's outputs are no finite numbers.
    """
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(number)
    texts: list[list[int]] = [[] for _ in prompts]
    for numbers in by_length.values():
        for first in range(0, len(numbers), together):
            some = numbers[first : first + together]
            found = _continued(model, [prompts[k] for k in some], max_new_tokens, eos_ids, ended)
            for number, ids in zip(some, found, strict=True):
                texts[number] = ids
    return texts


def _continued(
    model: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    ended: Callable[[list[int]], bool] | None,
) -> list[list[int]]:
    device = device_of(model)
    length = len(prompts[0])
    new = max(min(max_new_tokens, model.config.max_context - length), 0)
    next_logits = _stepper(model, len(prompts), length + new)
    fed = torch.tensor(prompts, device=device)
    written: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for _ in range(new):
        logits = next_logits(fed)  # (B, V)
        if not bool(torch.isfinite(logits.sum())):
            raise not_finite()
        chosen = logits.argmax(-1)
        for k, token in enumerate(chosen.tolist()):
            if done[k] or token in eos_ids:
                done[k] = True
                continue
            written[k].append(token)
            done[k] = ended is not None and ended(written[k])
        if all(done):
            break
        fed = chosen[:, None]
    return written


def _stepper(model: Any, batch: int, length: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """(B, n) ids that come next → (B, V) logits after them."""
    if hasattr(model, "new_caches"):
        caches = model.new_caches(batch, length)
        return lambda fed: model.head(model.hidden_states(fed, caches=caches)[:, -1])
    texts: list[torch.Tensor] = []

    def whole(fed: torch.Tensor) -> torch.Tensor:
        texts.append(fed)
        reader: CausalLM = model
        logits: torch.Tensor = reader.head(reader.hidden_states(torch.cat(texts, 1))[:, -1])
        return logits

    return whole


def device_of(model: Any) -> torch.device:
    """Where a model is; one that is quantised may keep its matrices in buffers."""
    device: torch.device = next(chain(model.parameters(), model.buffers())).device
    return device


def not_finite(what: str = "the model") -> UserError:
    """What is said instead of a score of 0."""
    return UserError(
        f"{what} gives outputs that are no finite numbers (NaN or infinite): it diverged, or its weights are "
        f"damaged or overflow in this --dtype; nothing was scored. Give an earlier checkpoint, or "
        f"--dtype float32"
    )
