"""``POST /v1/completions``: prompts as text or ids, each continued ``n`` times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from dualroute.model.decoding.sampler import TokenLogprob
from dualroute.serve.events import End, Piece, PromptRead
from dualroute.serve.jobs import Job, Served, Text, Written, finished
from dualroute.serve.routes.common import State, streamed
from dualroute.serve.schemas import CompletionRequest
from dualroute.serve.shapes import PING, new_id, sse, usage

#: OpenAI's.
DEFAULT_TOKENS = 16


async def _prompts(body: CompletionRequest, served: Served) -> list[list[int]]:
    given: Any = body.prompt
    if isinstance(given, str):
        given = [given]
    if isinstance(given[0], int):
        return [given]

    def ids() -> list[list[int]]:
        encode = served.tokenizer.encode
        return [encode(one, bos=True) if isinstance(one, str) else one for one in given]

    return await asyncio.to_thread(ids)


class _Answer:
    """One request's jobs and what becomes of them."""

    def __init__(
        self, state: State, body: CompletionRequest, served: Served, prompts: list[list[int]]
    ) -> None:
        self.body, self.served, self.texts = body, served, body.n or 1
        self.spelling = state.spelling(served)
        self.id, self.created = new_id("cmpl"), int(time.time())
        new_tokens = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        echoed = body.logprobs if body.echo else None
        self.jobs: list[Job] = []
        try:
            for prompt in prompts:
                self.jobs.append(
                    Job(
                        served,
                        body,
                        prompt,
                        new_tokens,
                        state.limits,
                        logprobs=body.logprobs,
                        prompt_logprobs=echoed,
                    )
                )
        except BaseException:
            for job in self.jobs:
                job.cancel()
            raise

    def _echo(self, job: Job) -> str:
        return self.served.tokenizer.decode(job.prompt) if self.body.echo else ""

    def choice(self, job: Job, number: int, written: Written) -> dict[str, Any]:
        """One text, whole."""
        text: Text = written.texts[number]
        tokens: list[TokenLogprob | int] = list(text.logprobs)
        if self.body.echo:
            tokens = [job.prompt[0], *written.prompt_logprobs, *tokens]
        return {
            "index": self.jobs.index(job) * self.texts + number,
            "text": self._echo(job) + text.text,
            "logprobs": None if self.body.logprobs is None else self.spelling.completion(tokens, 0),
            "finish_reason": text.reason,
        }

    def shaped(self, choices: list[dict[str, Any]], used: dict[str, Any] | None = None) -> dict[str, Any]:
        """An answer, or a piece of one."""
        own = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.served.name}
        return {**own, "choices": choices} | ({} if used is None else {"usage": used})

    def usage(self, all_written: list[Written]) -> dict[str, Any]:
        """Tokens of all of them."""
        new = sum(text.tokens for written in all_written for text in written.texts)
        return usage(sum(len(job.prompt) for job in self.jobs), new, sum(w.cached for w in all_written))

    async def whole(self, http: Request) -> dict[str, Any]:
        """All texts."""
        tasks = [asyncio.ensure_future(finished(job, http, self.texts)) for job in self.jobs]
        try:
            all_written = await asyncio.gather(*tasks)
        except BaseException:
            for task, job in zip(tasks, self.jobs, strict=True):
                task.cancel()
                job.cancel()
            raise
        choices = [
            self.choice(job, number, written)
            for job, written in zip(self.jobs, all_written, strict=True)
            for number in range(self.texts)
        ]
        return self.shaped(choices, self.usage(all_written))

    async def stream(self, http: Request) -> AsyncIterator[bytes]:
        """Pieces as they come, of one prompt after the other."""
        all_written = []
        try:
            for place, job in enumerate(self.jobs):
                written = Written([Text() for _ in range(max(self.texts, 1))])
                all_written.append(written)
                offset = [len(self._echo(job))] * self.texts
                async for event in job.events(http):
                    written.add(event)
                    if event is None:
                        yield PING
                    for choice in self._pieces(event, job, place, written, offset):
                        yield sse(self.shaped([choice]))
        except BaseException:
            for job in self.jobs:
                job.cancel()
            raise
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield sse(self.shaped([], self.usage(all_written)))

    def _pieces(
        self, event: object, job: Job, place: int, written: Written, offset: list[int]
    ) -> list[dict[str, Any]]:
        wants = self.body.logprobs is not None
        if isinstance(event, PromptRead) and self.body.echo:
            tokens: list[TokenLogprob | int] = [job.prompt[0], *event.logprobs]
            logprobs = self.spelling.completion(tokens, 0) if wants else None
            return [
                {
                    "index": place * self.texts + n,
                    "text": self._echo(job),
                    "logprobs": logprobs,
                    "finish_reason": None,
                }
                for n in range(self.texts)
            ]
        if not isinstance(event, Piece | End):
            return []
        logprobs = None
        if isinstance(event, Piece) and event.logprob is not None:
            logprobs = self.spelling.completion([event.logprob], offset[event.number])
            offset[event.number] += len(logprobs["tokens"][0])
        reason = event.reason if isinstance(event, End) else None
        if not event.text and logprobs is None and reason is None:
            return []
        index = place * self.texts + event.number
        return [{"index": index, "text": event.text, "logprobs": logprobs, "finish_reason": reason}]


def router(state: State) -> APIRouter:
    """The endpoint."""
    api = APIRouter()

    @api.post("/v1/completions")
    async def _(body: CompletionRequest, http: Request) -> Response:
        served = state.writer(body.model)
        answer = _Answer(state, body, served, await _prompts(body, served))
        if body.stream:
            return streamed(answer.stream(http), sse("[DONE]"))
        return JSONResponse(await answer.whole(http))

    return api
