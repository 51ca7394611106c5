"""The JSON of answers, as OpenAI's API has them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from dualroute.data.tokenizer import Tokenizer
from dualroute.model.decoding.sampler import TokenLogprob


def new_id(kind: str) -> str:
    """A name of an answer."""
    return f"{kind}-{uuid.uuid4().hex}"


def usage(prompt: int, written: int, cached: int) -> dict[str, Any]:
    """Tokens of a completion or a chat."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Spelling:
    """How tokens are written in an answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = tokenizer.token_bytes()
        self._pieces = tokenizer.pieces()

    def bytes_of(self, token: int) -> bytes:
        """UTF-8 of a token, of a special one its name."""
        return self._bytes[token] or self._pieces[token].encode()

    def text_of(self, token: int) -> str:
        """A token as text."""
        return self.bytes_of(token).decode(errors="replace")

    def chat(self, logprobs: Sequence[TokenLogprob], alternatives: int) -> dict[str, Any]:
        """`logprobs` of a choice of a chat."""

        def shaped(token: int, logprob: float) -> dict[str, Any]:
            spelled = self.bytes_of(token)
            return {
                "token": spelled.decode(errors="replace"),
                "logprob": _finite(logprob),
                "bytes": list(spelled),
            }

        return {
            "content": [
                {
                    **shaped(one.token, one.logprob),
                    "top_logprobs": [shaped(*other) for other in one.top[:alternatives]],
                }
                for one in logprobs
            ],
            "refusal": None,
        }

    def completion(self, tokens: Sequence[TokenLogprob | int], begin: int) -> dict[str, Any]:
        """`logprobs` of a choice of a completion; a token without one is the first of an echoed prompt."""
        texts: list[str] = []
        offsets: list[int] = []
        own: list[float | None] = []
        top: list[dict[str, float] | None] = []
        for one in tokens:
            token = one if isinstance(one, int) else one.token
            texts.append(self.text_of(token))
            offsets.append(begin)
            begin += len(texts[-1])
            if isinstance(one, int):
                own.append(None)
                top.append(None)
            else:
                own.append(_finite(one.logprob))
                top.append({self.text_of(other): _finite(value) for other, value in one.top})
        return {"tokens": texts, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets}


def _finite(value: float) -> float:
    return max(value, -9999.0)  # JSON knows no infinity


def sse(content: dict[str, Any] | str, event: str | None = None) -> bytes:
    """One server-sent event."""
    data = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return (f"event: {event}\n" if event else "").encode() + f"data: {data}\n\n".encode()


#: Says that the connection lives.
PING = b": wait\n\n"
