"""What every request goes through before it is read: its id, its key, its size, its time."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dualroute.serve.errors import ApiError
from dualroute.serve.metrics import Metrics

log = logging.getLogger(__name__)
_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_GONE = 499  # in the log and the metrics, as nginx writes it: nobody waited for an answer
ID_HEADER = "x-request-id"


class Gate:
    """ASGI middleware: ids, log lines, keys, and limits of a body.

    Args:
        app: What comes next.
        keys: Of which a request to ``/v1`` must bring one; empty for none.
        most_bytes: Of a body.
        body_seconds: In which it must have come.
        metrics: Are told of each answer.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], most_bytes: int, body_seconds: float, metrics: Metrics
    ) -> None:
        self.app, self.metrics = app, metrics
        self._keys = [key.encode() for key in keys]
        self.most_bytes, self.body_seconds = most_bytes, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        given = headers.get(ID_HEADER, "")
        name = given if _ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = name
        began, status = time.monotonic(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[ID_HEADER] = name
            await send(message)

        try:
            problem = self._key_problem(scope, headers)
            if problem is None:
                await self._within_limits(scope, headers, receive, answer)
            else:
                await problem.response()(scope, receive, answer)
        except ClientDisconnect:
            status = _GONE
        finally:
            known = getattr(scope.get("route"), "path", None) or "other"
            self.metrics.requests.labels(known, str(status)).inc()
            if scope["path"].startswith("/v1"):
                seconds = time.monotonic() - began
                with contextlib.suppress(OSError):  # who read the log has gone: that is no reason to stop
                    log.info("%s", f"{name} {scope['method']} {known} {status} {seconds:.3f} s")
        return None

    def _key_problem(self, scope: Scope, headers: Headers) -> ApiError | None:
        if not self._keys or not scope["path"].startswith("/v1") or scope["method"] == "OPTIONS":
            return None
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode()
        # every key is compared, so that the time does not say which was close
        right = sum(hmac.compare_digest(given, known) for known in self._keys)
        if kind.lower() == "bearer" and right:
            return None
        words = "the API key is wrong" if key else "an API key is needed: send Authorization: Bearer KEY"
        return ApiError(401, words, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _within_limits(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        too_large = ApiError(
            413, f"the body is larger than {self.most_bytes / 2**20:g} MiB", code="body_too_large"
        )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self.most_bytes:
            return await too_large.response()(scope, receive, send)
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return await self.app(scope, receive, send)
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.most_bytes:
                        return await too_large.response()(scope, receive, send)
        except TimeoutError:
            late = ApiError(408, f"the body did not come within {self.body_seconds:g} s", code="body_timeout")
            return await late.response()(scope, receive, send)
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return await self.app(scope, replay, send)
