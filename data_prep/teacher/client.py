"""A request to an OpenAI-compatible API, with its limits: size, time, rate and retries.

In: the body of a request.  Out: an :class:`Answer`, or an error that says whether to go on with others.
Next: :mod:`data_prep.teacher.generate` asks many at once.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.teacher.config import GenerateDataConfig
from dualroute.errors import UserError, one_line

MOST_BYTES = 64 * 2**20  # of an answer
_MOST_WAIT = 60.0  # seconds between two tries
_MOST_SAID = 300  # characters of a server's own message


class Refused(Exception):
    """This prompt was refused, or has failed too often; others may do."""


@dataclass(frozen=True)
class Answer:
    """What a model has written.

    Attributes:
        text: The answer.
        finish_reason: stop, length, ….
        tokens_in: Of the prompt, as the server counts.
        tokens_out: Of the answer.
    """

    text: str
    finish_reason: str
    tokens_in: int
    tokens_out: int


class Rate:
    """Lets requests begin at a steady rate.

    Args:
        per_minute: Requests; null does not wait.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 0.0 if per_minute is None else 60.0 / per_minute
        self._next = time.monotonic()
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Until it is this request's turn, or ``stop`` is set."""
        if not self._gap:
            return
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self._gap
        stop.wait(max(0.0, turn - time.monotonic()))


class Client:
    """Asks a server; may be used by several threads.

    Args:
        config: Where, and with which limits.
        key: Of the API; empty for none.

    Attributes:
        retried: Requests that were sent again.
        stop: When set, nothing is tried or waited for any more.
    """

    def __init__(self, config: GenerateDataConfig, key: str = "") -> None:
        self.config = config
        self.retried = 0
        self.stop = threading.Event()
        self._rate = Rate(config.requests_per_minute)
        self._headers = {"Content-Type": "application/json", "User-Agent": "dualroute"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._lock = threading.Lock()

    def ask(self, body: Mapping[str, Any]) -> Answer:
        """The answer to a request.

        Raises:
            Refused: The server does not take this prompt, or it failed too often.
            UserError: It would take none: a wrong key, model or address.
        """
        data = json.dumps(body).encode()
        for attempt in range(self.config.retries + 1):
            self._rate.wait(self.stop)
            if self.stop.is_set():
                raise Refused("stopped")
            try:
                return _parsed(self._post(data))
            except urllib.error.HTTPError as error:
                problem, wait = self._refusal(error)
            except (OSError, http.client.HTTPException, _Malformed) as error:
                problem, wait = one_line(str(getattr(error, "reason", error)) or type(error).__name__), 0.0
            if attempt < self.config.retries:
                with self._lock:
                    self.retried += 1
                # waits double, and differ between requests that failed together
                self.stop.wait(min(_MOST_WAIT, max(wait, 2**attempt * random.uniform(0.25, 0.5))))
        raise Refused(problem)

    def _post(self, data: bytes) -> bytes:
        request = urllib.request.Request(self.config.address, data, self._headers, method="POST")
        deadline = time.monotonic() + self.config.timeout_seconds
        with _OPENER.open(request, timeout=self.config.timeout_seconds) as response:
            pieces, size = [], 0
            while piece := response.read1(2**16):
                pieces.append(piece)
                size += len(piece)
                if size > MOST_BYTES:
                    raise _Malformed(f"the answer is longer than {MOST_BYTES:,} bytes")
                if time.monotonic() > deadline:
                    raise _Malformed(f"the answer took longer than {self.config.timeout_seconds:g} s")
        return b"".join(pieces)

    def _refusal(self, error: urllib.error.HTTPError) -> tuple[str, float]:
        """What an error of HTTP says, and how long it asks to wait, where it may pass."""
        said = _message(error)
        problem = f"{error.code}: {said}"
        if error.code in (401, 403):
            raise UserError(
                f"{self.config.server} refuses the key ({problem}): put it into the environment variable "
                f"{self.config.api_key_variable}, or name another with --api_key_variable"
            ) from error
        if error.code == 404 or 300 <= error.code < 400 or error.code == 405:
            raise UserError(
                f"{self.config.address} does not know the model {self.config.model!r}, or is no such API "
                f"({problem}): look at --server, --model and --kind"
            ) from error
        if error.code not in (408, 409, 425, 429) and error.code < 500:
            raise Refused(problem) from error
        try:
            return problem, max(0.0, float(error.headers.get("Retry-After") or 0))
        except ValueError:  # a date
            return problem, 0.0


class _Malformed(Exception):
    """What came is no answer."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key does not follow to another address."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _message(error: urllib.error.HTTPError) -> str:
    try:
        body = json.loads(error.read(2**16))
        said = body["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, http.client.HTTPException):
        said = error.reason
    return one_line(str(said))[:_MOST_SAID]


def _parsed(content: bytes) -> Answer:
    try:
        body = json.loads(content)
        choice, usage = body["choices"][0], body.get("usage") or {}
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        if not isinstance(text, str):
            raise TypeError("no text")
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        return Answer(text, str(choice.get("finish_reason")), counts[0], counts[1])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise _Malformed(f"what it sent is no answer of that API ({type(error).__name__})") from error
