"""What endpoints share: finding the model, prompts of chats, streams."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import StreamingResponse

from dualroute.errors import UserError
from dualroute.serve.errors import ApiError
from dualroute.serve.jobs import Limits, Served
from dualroute.serve.schemas import ChatMessage
from dualroute.serve.shapes import Spelling, sse


@dataclass
class State:
    """What the endpoints know."""

    models: Mapping[str, Served]
    limits: Limits
    spellings: dict[str, Spelling] = field(default_factory=dict)

    def model(self, name: str) -> Served:
        """The model that a request names.

        Raises:
            ApiError: There is none of that name.
        """
        if name not in self.models:
            near = difflib.get_close_matches(name[:200], self.models, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there is {', '.join(self.models)}"
            raise ApiError(404, f"there is no model {name[:200]!r}{hint}", "model", "model_not_found")
        return self.models[name]

    def writer(self, name: str) -> Served:
        """The same, and it must write text."""
        served = self.model(name)
        if not served.writes:
            raise ApiError(
                400,
                f"{name} reads both sides of a token or was trained for a task: it writes no text",
                "model",
            )
        return served

    def spelling(self, served: Served) -> Spelling:
        """How its tokens are written."""
        if served.name not in self.spellings:
            self.spellings[served.name] = Spelling(served.tokenizer)
        return self.spellings[served.name]


async def chat_prompt(served: Served, messages: Sequence[ChatMessage]) -> list[int]:
    """Ids of a chat up to where the answer begins.

    Raises:
        ApiError: It is no chat, or the model has no chat template.
    """
    tables = [message.as_table() for message in messages]
    try:
        return (await asyncio.to_thread(served.tokenizer.chat, tables, True, answers=False)).ids
    except UserError as error:
        raise ApiError(400, str(error), "messages") from error


def streamed(events: AsyncIterator[bytes], done: bytes = b"") -> StreamingResponse:
    """A stream whose errors are its last event."""

    async def guarded() -> AsyncIterator[bytes]:
        try:
            async for event in events:
                yield event
            if done:
                yield done
        except ApiError as error:
            yield sse(error.body)

    return StreamingResponse(guarded(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def asked(value: Any, default: Any) -> Any:
    """A value, or the default where it is null."""
    return default if value is None else value
