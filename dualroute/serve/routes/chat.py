"""``POST /v1/chat/completions``: a chat, answered ``n`` times by the tokenizer's own template."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from dualroute.serve.events import End, Piece
from dualroute.serve.jobs import Job, Text, Written, finished
from dualroute.serve.routes.common import State, asked, chat_prompt, streamed
from dualroute.serve.schemas import ChatRequest
from dualroute.serve.shapes import PING, new_id, sse, usage


def router(state: State) -> APIRouter:
    """The endpoint."""
    api = APIRouter()

    @api.post("/v1/chat/completions")
    async def _(body: ChatRequest, http: Request) -> Response:
        served = state.writer(body.model)
        alternatives = asked(body.top_logprobs, 0) if body.logprobs else None
        format_ = body.response_format
        job = Job(
            served,
            body,
            await chat_prompt(served, body.messages),
            asked(body.max_completion_tokens, body.max_tokens),
            state.limits,
            logprobs=alternatives,
            schema=None if format_ is None else format_.schema_,
        )
        spelling, count = state.spelling(served), body.n or 1
        named = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": served.name}

        def logprobs(text: Text) -> dict[str, Any] | None:
            return None if alternatives is None else spelling.chat(text.logprobs, alternatives)

        def used(written: Written) -> dict[str, Any]:
            return usage(len(job.prompt), sum(text.tokens for text in written.texts), written.cached)

        def piece(choices: list[dict[str, Any]], **more: Any) -> bytes:
            return sse({**named, "object": "chat.completion.chunk", "choices": choices, **more})

        def delta(number: int, content: dict[str, Any], reason: str | None = None, logs: Any = None) -> bytes:
            return piece([{"index": number, "delta": content, "logprobs": logs, "finish_reason": reason}])

        async def stream() -> AsyncIterator[bytes]:
            written = Written([Text() for _ in range(count)])
            for number in range(count):
                yield delta(number, {"role": "assistant", "content": ""})
            async for event in job.events(http):
                written.add(event)
                if event is None:
                    yield PING
                elif isinstance(event, Piece):
                    logs = None
                    if event.logprob is not None and alternatives is not None:
                        logs = spelling.chat([event.logprob], alternatives)
                    if event.text or logs:
                        yield delta(event.number, {"content": event.text}, logs=logs)
                elif isinstance(event, End):
                    yield delta(event.number, {"content": event.text} if event.text else {}, event.reason)
            if body.stream_options is not None and body.stream_options.include_usage:
                yield piece([], usage=used(written))

        if body.stream:
            return streamed(stream(), sse("[DONE]"))
        written = await finished(job, http, count)
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": text.text, "refusal": None},
                "logprobs": logprobs(text),
                "finish_reason": text.reason,
            }
            for number, text in enumerate(written.texts)
        ]
        return JSONResponse(
            {**named, "object": "chat.completion", "choices": choices, "usage": used(written)}
        )

    return api
