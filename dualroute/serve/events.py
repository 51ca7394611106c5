"""What is asked of the engine, and what it tells."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dualroute.model.decoding.sampler import Sampler, TokenLogprob

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """A token of a text; `text` is what it makes certain, which may be empty."""

    number: int
    text: str
    token: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class End:
    """A text is done."""

    number: int
    text: str
    reason: Reason
    tokens: int


@dataclass(frozen=True)
class PromptRead:
    """The prompt was read; `logprobs` of its tokens from the second on, where they were asked for."""

    cached: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Failure:
    """The request as a whole has failed; nothing follows."""

    message: str
    kind: Literal["timeout", "server", "request", "shutdown"]


Event = Piece | End | PromptRead | Failure


class Busy(Exception):
    """There is no room for another request now."""


@dataclass
class Request:
    """What is asked for.

    Args:
        prompt: Ids; at least one.
        new_tokens: At most, for each text.
        samplers: One for each text that is wanted; a text of its own begins with each.  None with
            ``new_tokens`` 0.
        stops: Strings that end a text.
        listener: Gets the events, in the engine's thread; must not block.
        prompt_logprobs: Alternatives of each token of the prompt that are wanted; null wants none.
        ignore_eos: Go on after an end of the text.
        deadline: `time.monotonic` after which it is given up.
    """

    prompt: Sequence[int]
    new_tokens: int
    samplers: Sequence[Sampler]
    listener: Callable[[Event], None]
    stops: Sequence[str] = ()
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    deadline: float = float("inf")
    came: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def capacity(self) -> int:
        """Tokens that each of its texts may have."""
        return len(self.prompt) + self.new_tokens
