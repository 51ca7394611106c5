"""From a request of the API to the engine's events, and back into the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request as HttpRequest
from starlette.requests import ClientDisconnect
from torch import Tensor

from dualroute.control.grammar import Grammar, GrammarConstraint
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.model import SamplingConfig
from dualroute.model.decoding.sampler import Constraint, Sampler, TokenLogprob
from dualroute.serve.engine import Engine
from dualroute.serve.errors import ApiError
from dualroute.serve.events import Busy, End, Event, Failure, Piece, PromptRead, Request
from dualroute.serve.schemas import Sampled

_POLL = 0.5  # seconds between two looks whether the client is still there
_STATUS = {"timeout": 504, "server": 500, "request": 400, "shutdown": 503}


@dataclass
class Served:
    """A model that requests can name."""

    name: str
    engine: Engine
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def context(self) -> int:
        return self.engine.model.config.max_context

    @property
    def writes(self) -> bool:
        """Whether it can continue a text."""
        config = self.engine.model.config
        return config.causal and config.task_head is None and config.reads_text

    @property
    def chats(self) -> bool:
        """Whether its tokenizer knows how a chat is written."""
        try:
            _ = self.tokenizer.chat_template
        except UserError:
            return False
        return self.writes


class LogitBias:
    """Adds to the logits of some tokens."""

    is_finished = False

    def __init__(self, bias: Mapping[str, float], vocab_size: int) -> None:
        self._ids = [int(key) for key in bias]
        self._values = list(bias.values())
        wrong = next((i for i in self._ids if i >= vocab_size), None)
        if wrong is not None:
            raise UserError(f"logit_bias names token {wrong}, and the vocabulary ends at {vocab_size - 1}")

    def restrict(self, logits: Tensor, room: int) -> None:
        """See :class:`~dualroute.model.decoding.sampler.Constraint`."""
        logits[self._ids] += logits.new_tensor(self._values)

    def accept(self, token: int) -> None:
        """See :class:`~dualroute.model.decoding.sampler.Constraint`."""


def busy(error: Busy, engine: Engine) -> ApiError:
    """What a client is told that has to wait."""
    status = 429 if engine.is_alive else 503
    return ApiError(status, f"{error}: try again later", code="busy", headers={"Retry-After": "5"})


@dataclass(frozen=True)
class Limits:
    """Of each request: tokens that it may ask for, and seconds."""

    max_tokens: int | None = None
    timeout_s: float = 600.0


class Job:
    """The texts of one prompt, being written.

    Args:
        served: By which model.
        body: How tokens are drawn.
        prompt: Ids.
        new_tokens: Asked for; null takes what the context leaves.
        limits: Of the server.
        logprobs: Alternatives of each new token; null for none.
        prompt_logprobs: Of each token of the prompt.
        schema: JSON schema that the text must fit.

    Raises:
        ApiError: The request cannot be served, or not now.
    """

    def __init__(
        self,
        served: Served,
        body: Sampled,
        prompt: Sequence[int],
        new_tokens: int | None,
        limits: Limits,
        *,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> None:
        self.served, self.prompt = served, list(prompt)
        room = served.context - len(self.prompt)
        if room < (new_tokens is None or new_tokens > 0):
            raise ApiError(
                400,
                f"the prompt has {len(self.prompt):,} tokens and the model's context {served.context:,}: "
                f"shorten it",
                code="context_length_exceeded",
            )
        if new_tokens is None:
            new_tokens = min(room, limits.max_tokens or room)
        elif new_tokens > (limits.max_tokens or new_tokens):
            raise ApiError(
                400,
                f"at most {limits.max_tokens:,} tokens may be asked for, not {new_tokens:,}",
                "max_tokens",
            )
        elif new_tokens > room:
            raise ApiError(
                400,
                f"the prompt has {len(self.prompt):,} tokens and {new_tokens:,} may be written, together "
                f"more than the model's context of {served.context:,}: shorten one of them",
                code="context_length_exceeded",
            )
        wrong = next((i for i in self.prompt if i >= served.tokenizer.vocab_size), None)
        if wrong is not None:
            raise ApiError(400, f"the prompt has the token {wrong}, which is not in the vocabulary", "prompt")
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        try:
            samplers = self._samplers(body, new_tokens, logprobs, schema) if new_tokens else []
            self._request = Request(
                self.prompt,
                new_tokens,
                samplers,
                lambda event: _hand_over(loop, self._events, event),
                body.stops,
                prompt_logprobs,
                body.ignore_eos,
                time.monotonic() + limits.timeout_s,
            )
            served.engine.submit(self._request)
        except Busy as error:
            raise busy(error, served.engine) from error
        except UserError as error:
            raise ApiError(400, str(error)) from error

    def _samplers(
        self, body: Sampled, new_tokens: int, logprobs: int | None, schema: Mapping[str, Any] | None
    ) -> list[Sampler]:
        seed = random.getrandbits(62) if body.seed is None else body.seed
        names = ("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        given = {name: value for name in names if (value := getattr(body, name)) is not None}
        sampling = SamplingConfig(
            max_new_tokens=new_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            logprobs=logprobs,
            **given,
        )
        samplers = []
        for number in range(body.n or 1):
            constraints: list[Constraint] = []
            if body.logit_bias:
                constraints.append(LogitBias(body.logit_bias, self.served.tokenizer.vocab_size))
            if schema is not None:
                constraints.append(GrammarConstraint(self.served.tokenizer, Grammar.of_schema(schema)))
            own = replace(sampling, seed=(seed + number + 2**63) % 2**64 - 2**63)
            samplers.append(Sampler(own, self.prompt, constraints=constraints))
        return samplers

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._request.cancelled.set()

    async def events(self, http: HttpRequest) -> AsyncIterator[Event | None]:
        """What happens, until all texts are done; null now and then while nothing does.

        Raises:
            ApiError: It has failed.
            ClientDisconnect: Nobody listens any more.
        """
        ended, wanted, looked = 0, max(len(self._request.samplers), 1), time.monotonic()
        try:
            while ended < wanted:
                event = None
                with contextlib.suppress(TimeoutError):
                    event = await asyncio.wait_for(self._events.get(), _POLL)
                if time.monotonic() - looked > _POLL:
                    looked = time.monotonic()
                    if await http.is_disconnected():
                        raise ClientDisconnect
                if event is None:
                    yield None
                    continue
                if isinstance(event, Failure):
                    raise ApiError(_STATUS[event.kind], event.message, code=event.kind)
                ended += isinstance(event, End)
                yield event
        finally:
            if ended < wanted:
                self.cancel()


def _hand_over(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    loop.call_soon_threadsafe(events.put_nowait, event)  # RuntimeError where the loop is closed


@dataclass
class Text:
    """A text of a job, whole."""

    text: str = ""
    reason: str | None = None
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass
class Written:
    """What a job has come to."""

    texts: list[Text]
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    cached: int = 0

    def add(self, event: Event | None) -> None:
        """Take one event in."""
        if isinstance(event, PromptRead):
            self.cached, self.prompt_logprobs = event.cached, event.logprobs
        elif isinstance(event, Piece):
            text = self.texts[event.number]
            text.text += event.text
            text.tokens += 1
            if event.logprob is not None:
                text.logprobs.append(event.logprob)
        elif isinstance(event, End):
            text = self.texts[event.number]
            text.text += event.text
            text.reason, text.tokens = event.reason, event.tokens


async def finished(job: Job, http: HttpRequest, texts: int) -> Written:
    """All that a job writes."""
    written = Written([Text() for _ in range(texts)])
    async for event in job.events(http):
        written.add(event)
    return written
