"""A conversation with a model, turn by turn: what it has read stays in its caches.

In: what the user says.  Here: the tokenizer's chat template makes ids of the whole chat; those that the
caches hold already are not read again.  Where the chat outgrows the model's context its oldest turns go, and
the caches are filled anew.  Out: the answer, in pieces of whole characters.  Next:
:mod:`dualroute.evaluate.chat` shows it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import torch

from dualroute.control import TextStream, new_sampler
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, SamplingConfig

CAPACITY = 512  # tokens that a cache has room for at first
Message = dict[str, Any]


def without_oldest(messages: Sequence[Mapping[str, Any]]) -> list[Message] | None:
    """A chat without its oldest question and what answered it; null where only one question is left."""
    system = [dict(message) for message in messages[:1] if message["role"] == "system"]
    turns = [dict(message) for message in messages[len(system) :]]
    begins = [number for number, message in enumerate(turns) if message["role"] == "user"]
    return [*system, *turns[begins[1] :]] if len(begins) > 1 else None


class Conversation:
    """One chat with a model.

    Args:
        model: On its device, in evaluation mode.
        tokenizer: Its, with a chat template.
        sampling: How tokens are drawn, and how many for an answer at most.
        system: What the system says first; "" nothing.
        cache_dtype: How complete blocks of the global route are kept: auto, int8 or int4.

    Attributes:
        messages: The chat so far, without turns that had to go.
        left_out: Questions that have gone with their answers, because the context was full.
        tokens_read: Tokens that the model has read so far, answers included.

    Raises:
        UserError: The tokenizer has no chat template and none can be made for it.
    """

    def __init__(
        self,
        model: DualRoutingTransformer,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        system: str = "",
        *,
        cache_dtype: str = "auto",
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.system, self.cache_dtype = system, cache_dtype
        self.tokens_read = 0
        _ = tokenizer.chat_template
        self.reset()

    def reset(self) -> None:
        """Begin a new chat."""
        self.messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        self.left_out = 0
        self._generator = torch.Generator().manual_seed(self.sampling.seed)
        self._held: list[int] = []  # ids in the caches
        self._caches: list[Any] = []

    def answer(self, said: str) -> Generator[str, None, None]:
        """The answer to what the user says, as it is made.

        An iterator that is closed early leaves what was written until then as the answer.

        Raises:
            UserError: The turn alone is longer than the model's context; the chat is then as it was.
        """
        before, gone = self.messages, self.left_out
        self.messages = [*before, {"role": "user", "content": said}]
        try:
            ids = self._fitting()
        except UserError:
            self.messages, self.left_out = before, gone
            raise
        stream = TextStream(self.tokenizer, stops=self.sampling.stop)
        try:
            for token in self._tokens(ids):
                piece = stream.add(token)
                if piece:
                    yield piece
                if stream.stopped is not None:
                    break
            rest = stream.finish()
            if rest:
                yield rest
        finally:  # also where the iterator is closed, or the user interrupts
            stream.finish()
            self.messages.append({"role": "assistant", "content": stream.text})

    def _fitting(self) -> list[int]:
        """Ids of the chat up to where the answer begins, with room for one."""
        limit = self.model.config.max_context
        room = limit - min(self.sampling.max_new_tokens, limit // 2)
        while True:
            ids = self.tokenizer.chat(self.messages, add_generation_prompt=True, answers=False).ids
            if len(ids) <= room:
                return ids
            shorter = without_oldest(self.messages)
            if shorter is None:
                raise UserError(
                    f"this turn has {len(ids)} tokens with what stands before it, and the model reads at "
                    f"most {limit}, {limit - room} of them for the answer: shorten it"
                )
            self.messages, self.left_out = shorter, self.left_out + 1

    @torch.no_grad()
    def _tokens(self, ids: list[int]) -> Iterator[int]:
        """New ids after ``ids``, without the one that ends the turn."""
        model, limit = self.model, self.model.config.max_context
        device = model.norm.weight.device
        if not self._held or ids[: len(self._held)] != self._held or len(ids) == len(self._held):
            weight = model.norm.weight
            attentions: list[Any] = [layer.attention for layer in model.layers]
            options: dict[str, Any] = {"capacity": CAPACITY, "cache_dtype": self.cache_dtype}
            self._caches = [
                attention.new_cache(1, limit, device, weight.dtype, **options) for attention in attentions
            ]
            self._held = []
        fed = ids[len(self._held) :]
        stops = self.tokenizer.eos_ids
        sampler = new_sampler(self.sampling, self.tokenizer, ids, generator=self._generator)
        sampler.room = min(sampler.room, limit - len(ids))
        while not sampler.is_finished:
            held, self._held = self._held, []  # an interrupt in a layer leaves the caches unequal
            hidden = model.hidden_states(torch.tensor([fed], device=device), caches=self._caches)
            self._held = [*held, *fed]
            self.tokens_read += len(fed)
            token = sampler.draw(model.head(hidden[0, -1]).cpu())
            if token in stops:
                return
            yield token
            fed = [token]
