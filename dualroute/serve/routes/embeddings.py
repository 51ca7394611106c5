"""``POST /v1/embeddings``: the mean of a text's last hidden states, of length 1."""

from __future__ import annotations

import asyncio
import base64
import functools
from typing import Any

import torch
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from dualroute.serve.engine import NOT_FINITE
from dualroute.serve.errors import ApiError
from dualroute.serve.events import Busy
from dualroute.serve.jobs import Served, busy
from dualroute.serve.routes.common import State
from dualroute.serve.schemas import EmbeddingsRequest


@torch.no_grad()
def embedding(served: Served, ids: list[int]) -> list[float]:
    """(dim) numbers of one text."""
    model = served.engine.model
    states = model.hidden_states(torch.tensor([ids], device=model.norm.weight.device))[0]
    return torch.nn.functional.normalize(states.float().mean(0), dim=0).cpu().tolist()


async def _ids(body: EmbeddingsRequest, served: Served) -> list[list[int]]:
    is_one = isinstance(body.input, str) or isinstance(body.input[0], int)
    given: list[Any] = [body.input] if is_one else body.input  # type: ignore[assignment]
    texts = await asyncio.to_thread(
        lambda: [served.tokenizer.encode(one, bos=True) if isinstance(one, str) else one for one in given]
    )
    for number, ids in enumerate(texts):
        if len(ids) > served.context:
            message = f"input[{number}] has {len(ids):,} tokens and the model's context {served.context:,}"
            raise ApiError(400, f"{message}: shorten it", "input", "context_length_exceeded")
        if max(ids) >= served.tokenizer.vocab_size:
            raise ApiError(400, f"input[{number}] has a token that is not in the vocabulary", "input")
    return texts


def router(state: State) -> APIRouter:
    """The endpoint."""
    api = APIRouter()

    @api.post("/v1/embeddings")
    async def _(body: EmbeddingsRequest, http: Request) -> Response:
        served = state.model(body.model)
        if not served.engine.model.config.reads_text:
            raise ApiError(400, f"{body.model} reads no text", "model")
        texts = await _ids(body, served)
        vectors = []
        for ids in texts:
            try:
                future = served.engine.call(functools.partial(embedding, served, ids))
            except Busy as error:
                raise busy(error, served.engine) from error
            vector = await asyncio.wrap_future(future)
            if not all(abs(value) <= 1.01 for value in vector):  # NaN compares as false
                raise ApiError(500, NOT_FINITE)
            vectors.append(vector)
            if await http.is_disconnected():
                raise ClientDisconnect
        data = [
            {"object": "embedding", "index": number, "embedding": _encoded(vector, body.encoding_format)}
            for number, vector in enumerate(vectors)
        ]
        count = sum(len(ids) for ids in texts)
        used = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": used})

    return api


def _encoded(vector: list[float], kind: str | None) -> list[float] | str:
    if kind != "base64":
        return vector
    return base64.b64encode(torch.tensor(vector).numpy().astype("<f4").tobytes()).decode()
