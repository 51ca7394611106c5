"""``POST /v1/responses``: text in, one text out; nothing is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from dualroute.serve.errors import ApiError
from dualroute.serve.events import End, Piece
from dualroute.serve.jobs import Job, Text, Written, finished
from dualroute.serve.routes.common import State, chat_prompt, streamed
from dualroute.serve.schemas import ChatMessage, ResponsesRequest
from dualroute.serve.shapes import PING, new_id, sse


class _Answer:
    """One response."""

    def __init__(self, body: ResponsesRequest, job: Job) -> None:
        self.body, self.job = body, job
        self.id, self.message_id, self.created = new_id("resp"), new_id("msg"), int(time.time())

    def message(self, text: str, status: str) -> dict[str, Any]:
        """The item that holds the text."""
        content = [] if status == "in_progress" else [self.part(text)]
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def response(self, written: Written | None) -> dict[str, Any]:
        """The whole, or where nothing is written yet its beginning."""
        body, status, output, used, incomplete = self.body, "in_progress", [], None, None
        if written is not None:
            text = written.texts[0]
            status = "completed" if text.reason == "stop" else "incomplete"
            incomplete = None if text.reason == "stop" else {"reason": "max_output_tokens"}
            output = [self.message(text.text, status)]
            used = {
                "input_tokens": len(self.job.prompt),
                "input_tokens_details": {"cached_tokens": written.cached},
                "output_tokens": text.tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": len(self.job.prompt) + text.tokens,
            }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "model": self.job.served.name,
            "status": status,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {
                "format": (body.text.format.model_dump(by_alias=True) if body.text else {"type": "text"})
            },
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": used,
        }

    async def stream(self, http: Request) -> AsyncIterator[bytes]:
        """Its events, numbered."""
        number = -1

        def event(kind: str, **content: Any) -> bytes:
            nonlocal number
            number += 1
            return sse({"type": kind, "sequence_number": number, **content}, kind)

        place = {"output_index": 0, "item_id": self.message_id, "content_index": 0}
        written = Written([Text()])
        yield event("response.created", response=self.response(None))
        yield event("response.in_progress", response=self.response(None))
        yield event("response.output_item.added", output_index=0, item=self.message("", "in_progress"))
        yield event("response.content_part.added", **place, part=self.part(""))
        try:
            async for one in self.job.events(http):
                written.add(one)
                if one is None:
                    yield PING
                if isinstance(one, Piece | End) and one.text:
                    yield event("response.output_text.delta", **place, delta=one.text, logprobs=[])
        except ApiError as error:
            failed = {"code": "server_error", "message": error.message}
            yield event(
                "response.failed", response=self.response(None) | {"status": "failed", "error": failed}
            )
            return
        text = written.texts[0].text
        whole = self.response(written)
        yield event("response.output_text.done", **place, text=text, logprobs=[])
        yield event("response.content_part.done", **place, part=self.part(text))
        yield event("response.output_item.done", output_index=0, item=whole["output"][0])
        yield event(f"response.{whole['status']}", response=whole)


def router(state: State) -> APIRouter:
    """The endpoint."""
    api = APIRouter()

    @api.post("/v1/responses")
    async def _(body: ResponsesRequest, http: Request) -> Response:
        served = state.writer(body.model)
        given = [ChatMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
        first = [] if body.instructions is None else [ChatMessage(role="system", content=body.instructions)]
        schema = None
        if body.text is not None and body.text.format.type != "text":
            schema = body.text.format.content or {"type": "object"}
        prompt = await chat_prompt(served, [*first, *given])
        answer = _Answer(body, Job(served, body, prompt, body.max_output_tokens, state.limits, schema=schema))
        if body.stream:
            return streamed(answer.stream(http))
        return JSONResponse(answer.response(await finished(answer.job, http, 1)))

    return api
