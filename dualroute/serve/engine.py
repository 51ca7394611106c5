"""Continuous batching: one thread owns a model and writes all texts that are asked for, a token each a step.

In: :class:`Request` objects from any thread.  Here: texts join and leave between two steps; a long prompt is
read in chunks, one between two steps, so that it does not stop the others; a text is let in when the memory
of its keys and values is free; what was read is kept for requests that begin like it (:mod:`.prefixes`).
Out: events to the request's listener, called in the engine's thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from dualroute.control import TextStream
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer
from dualroute.model.decoding.batched import Caches, copied, new_text, next_logits, num_bytes
from dualroute.model.decoding.sampler import Sampler, TokenLogprob
from dualroute.serve.events import Busy, End, Event, Failure, Piece, PromptRead, Reason, Request
from dualroute.serve.metrics import Metrics
from dualroute.serve.prefixes import PrefixCache

log = logging.getLogger(__name__)
Result = TypeVar("Result")
NOT_FINITE = "the model gave numbers that are not finite: its weights are damaged or overflow"


@dataclass
class _Reading:
    """A request whose prompt is being read."""

    request: Request
    caches: Caches
    read: int
    reserved: int  # bytes
    cached: int
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass
class _Writing:
    """A text that is being written."""

    request: Request
    number: int
    caches: Caches
    sampler: Sampler
    stream: TextStream
    reserved: int
    last: int  # the newest token, which the model has not read
    tokens: int = 0
    seen: float = 0.0


class Engine:
    """A model that writes.

    Args:
        model: On its device, in evaluation mode.
        tokenizer: Its.
        max_batch: Texts at the same time.
        max_waiting: Requests that may wait.
        cache_bytes: Of keys and values of all texts.
        prefix_share: Of them, for texts that are done.
        prefill_chunk: Tokens of a prompt between two steps.
        cache_dtype: How complete blocks of the global route are kept: auto, int8 or int4.
        metrics: Are told.
    """

    def __init__(
        self,
        model: DualRoutingTransformer,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 16,
        max_waiting: int = 128,
        cache_bytes: int = 1 << 30,
        prefix_share: float = 0.25,
        prefill_chunk: int = 256,
        cache_dtype: str = "auto",
        metrics: Metrics | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.max_waiting, self.prefill_chunk = max_batch, max_waiting, prefill_chunk
        self.cache_bytes, self.cache_dtype = cache_bytes, cache_dtype
        self.metrics = metrics or Metrics()
        self.prefixes = PrefixCache(int(cache_bytes * prefix_share))
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._waiting: deque[Request] = deque()
        self._reading: deque[_Reading] = deque()
        self._writing: list[_Writing] = []
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._reserved = 0
        self._pending = 0  # requests that were taken and have not ended
        self._lock = threading.Lock()
        self._state: Literal["running", "draining", "stopped"] = "running"
        self._stop_at = float("inf")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ from any thread

    def submit(self, request: Request) -> None:
        """Take a request; events follow.

        Raises:
            Busy: Too many wait, or the engine is being stopped.
            UserError: The request can never be served.
        """
        limit = self.model.config.max_context
        if not request.prompt:
            raise UserError("the prompt is empty: give at least one token")
        if request.capacity > limit:
            raise UserError(
                f"the prompt has {len(request.prompt):,} tokens and {request.new_tokens:,} may be written, "
                f"together more than the model's context of {limit:,}: shorten one of them"
            )
        if self._need(request) > self.cache_bytes:
            raise UserError(
                f"keys and values of this request need {self._need(request) / 2**20:,.0f} MiB, and the "
                f"server has {self.cache_bytes / 2**20:,.0f} MiB for all (cache_gb): ask for less"
            )
        with self._lock:
            if self._state != "running":
                raise Busy("the server is being stopped")
            if self._pending >= self.max_waiting + self.max_batch:
                raise Busy(f"{self._pending} requests are being served or wait already")
            self._pending += 1
        self._inbox.put(request)

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken."""
        return self._state == "running" and self._thread.is_alive()

    @property
    def load(self) -> dict[str, int]:
        """How much there is to do."""
        return {
            "waiting": self._pending - len(self._reading) - len({id(t.request) for t in self._writing}),
            "reading": len(self._reading),
            "writing": len(self._writing),
            "cache_bytes": self._reserved + self.prefixes.bytes,
        }

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Have something computed with the model, between two steps.

        Raises:
            Busy: Too many wait, or the engine is being stopped.
        """
        future: Future[Result] = Future()
        with self._lock:
            if self._state != "running":
                raise Busy("the server is being stopped")
            if len(self._calls) >= self.max_waiting:
                raise Busy(f"{len(self._calls)} calls wait already")
            self._calls.append((function, future))
        self._inbox.put(None)
        return future

    def warm_up(self) -> None:
        """Compute a token, so that kernels are compiled before the first request comes."""
        self.call(self._one_token).result()

    @torch.no_grad()
    def _one_token(self) -> None:
        config = self.model.config
        if not config.reads_text:
            return
        ids = torch.tensor([[0, 1, 2]], device=self.model.norm.weight.device)
        self.model.hidden_states(ids)
        if config.causal:
            text = new_text(self.model, 4, cache_dtype=self.cache_dtype)
            self.model.hidden_states(ids, caches=text)
            next_logits(self.model, [0], [text])

    def stop(self, within: float = 0.0) -> None:
        """Take no more requests, let those that run finish for `within` seconds, and end the thread."""
        with self._lock:
            self._state = "draining"
            self._stop_at = time.monotonic() + within
        self._inbox.put(None)
        self._thread.join()

    # ------------------------------------------------------------------ in the engine's thread

    def _run(self) -> None:
        try:
            while self._state == "running" or self._pending:
                self._take(block=not (self._waiting or self._reading or self._writing or self._calls))
                self._drop()
                self._admit()
                self._answer_call()
                self._read_chunk()
                self._step()
        except BaseException as error:  # nobody may wait for ever
            log.error("%s", f"the engine has failed: {type(error).__name__}: {error}", exc_info=error)
            self._state = "draining"
            self._stop_at = 0.0
        finally:
            self._take(block=False)
            self._fail_all("the server was stopped")
            self._state = "stopped"
            for _, future in self._calls:
                future.cancel()

    def _take(self, block: bool) -> None:
        while block or not self._inbox.empty():
            request = self._inbox.get()
            block = False
            if request is not None:
                self._waiting.append(request)

    def _drop(self) -> None:
        """End requests that nobody waits for, whose time is over, or that the server will not finish."""
        now = time.monotonic()
        if now > self._stop_at:
            return self._fail_all("the server was stopped")
        for request in self._requests():
            if request.cancelled.is_set():
                self._end_request(request, None)
            elif now > request.deadline:
                seconds = request.deadline - request.came
                self._end_request(
                    request, Failure(f"the request was given up after {seconds:.0f} s", "timeout")
                )
        return None

    def _answer_call(self) -> None:
        if self._calls:
            function, future = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

    def _requests(self) -> list[Request]:
        """All that have not ended."""
        begun = [*(one.request for one in self._reading), *(one.request for one in self._writing)]
        return [*self._waiting, *{id(request): request for request in begun}.values()]

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """End requests by an error that should not have come."""
        name = type(error).__name__
        log.error("%s", f"a request has failed: {name}: {error}", exc_info=error)
        for request in requests:
            self._end_request(
                request, Failure(f"the server has failed ({name}); its log says more", "server")
            )

    def _fail_all(self, message: str) -> None:
        for request in self._requests():
            self._end_request(request, Failure(message, "shutdown"))

    def _end_request(self, request: Request, event: Event | None) -> None:
        """Forget a request, wherever it stands."""
        held: list[_Reading | _Writing] = [*self._reading, *self._writing]
        gone = [one for one in held if one.request is request]
        waits = request in self._waiting
        if not gone and not waits:
            return
        self._reserved -= sum(t.reserved for t in gone)
        if waits:
            self._waiting.remove(request)
        self._reading = deque(r for r in self._reading if r.request is not request)
        self._writing = [t for t in self._writing if t.request is not request]
        with self._lock:
            self._pending -= 1
        if event is not None:
            self._tell(request, event)

    def _tell(self, request: Request, event: Event) -> None:
        try:
            request.listener(event)
        except Exception as error:  # a listener that has gone is no reason to stop the others
            log.debug("a listener failed: %s", error)
            request.cancelled.set()

    def _need(self, request: Request) -> int:
        texts = max(len(request.samplers), 1)
        return texts * num_bytes(self.model, request.capacity, cache_dtype=self.cache_dtype)

    def _admit(self) -> None:
        """Let requests in, in their order, while there is a place and memory."""
        while self._waiting:
            request = self._waiting[0]
            texts = max(len(request.samplers), 1)
            busy = len(self._writing) + sum(max(len(r.request.samplers), 1) for r in self._reading)
            if busy and busy + texts > self.max_batch:
                return
            need = self._need(request)
            self.prefixes.shrink_to(max(self.cache_bytes - self._reserved - need, 0))
            if self._reserved + self.prefixes.bytes + need > self.cache_bytes:
                return
            self._waiting.popleft()
            found = None if request.prompt_logprobs is not None else self.prefixes.find(request.prompt)
            if found is None:
                caches, read = new_text(self.model, request.capacity, cache_dtype=self.cache_dtype), 0
            else:
                caches, read = copied(self.model, found.caches, request.capacity), len(found.ids)
            self._reserved += need
            self._reading.append(_Reading(request, caches, read, need, cached=read))
            self.metrics.waited.observe(time.monotonic() - request.came)

    def _read_chunk(self) -> None:
        """One chunk of the oldest prompt."""
        if self._reading:
            reading = self._reading[0]
            try:
                self._read_some(reading)
            except Exception as error:
                self._fail([reading.request], error)

    @torch.no_grad()
    def _read_some(self, reading: _Reading) -> None:
        request = reading.request
        prompt, begin = request.prompt, reading.read
        end = min(begin + self.prefill_chunk, len(prompt))
        device = self.model.norm.weight.device
        hidden = self.model.hidden_states(
            torch.tensor([list(prompt[begin:end])], device=device), caches=reading.caches
        )[0]
        reading.read = end
        if request.prompt_logprobs is not None:
            targets = prompt[begin + 1 : end + 1]
            logits = self.model.head(hidden[: len(targets)]).float().cpu()
            reading.logprobs += logprobs_of(logits, targets, request.prompt_logprobs)
        if end < len(prompt):
            self._reading.rotate(-1)  # prompts of others come next
            return
        self._reading.popleft()
        self.metrics.prompt_tokens.inc(len(prompt))
        self.metrics.cached_tokens.inc(reading.cached)
        self._tell(request, PromptRead(reading.cached, tuple(reading.logprobs)))
        self._begin(reading, self.model.head(hidden[-1]).float().cpu())

    def _begin(self, reading: _Reading, logits: Tensor) -> None:
        """The first token of each text that a request wants."""
        request = reading.request
        if not request.samplers:
            self._reserved -= reading.reserved
            self._keep(request.prompt, reading.caches)
            with self._lock:
                self._pending -= 1
            self._tell(request, End(0, "", "length", 0))
            return
        count = len(request.samplers)
        caches = [
            reading.caches,
            *(copied(self.model, reading.caches, request.capacity) for _ in range(count - 1)),
        ]
        texts = [
            _Writing(
                request, number, caches[number], sampler,
                TextStream(self.tokenizer, request.prompt, request.stops),
                reading.reserved // count, last=-1, seen=request.came,
            )
            for number, sampler in enumerate(request.samplers)
        ]  # fmt: skip
        self._reserved += sum(text.reserved for text in texts) - reading.reserved  # what a division left over
        self._writing += texts
        for text in texts:
            if text in self._writing:  # a failure of one is one of all
                self._draw(text, logits)

    def _step(self) -> None:
        """One more token of each text."""
        if not self._writing:
            return
        texts = list(self._writing)
        try:
            logits = next_logits(self.model, [text.last for text in texts], [text.caches for text in texts])
            rows = logits.float().cpu()
        except Exception as error:  # their caches are of unequal length now
            return self._fail([text.request for text in texts], error)
        for text, row in zip(texts, rows, strict=True):
            if text in self._writing:
                self._draw(text, row)

    def _draw(self, text: _Writing, logits: Tensor) -> None:
        """The next token of a text, and what follows from it."""
        request = text.request
        if not bool(torch.isfinite(logits).all()):
            return self._end_request(request, Failure(NOT_FINITE, "server"))
        try:
            token = text.sampler.draw(logits)
        except UserError as error:
            return self._end_request(request, Failure(str(error), "request"))
        except Exception as error:  # is no reason to stop the others
            return self._fail([request], error)
        now = time.monotonic()
        observed = self.metrics.next_token if text.tokens else self.metrics.first_token
        observed.observe(now - text.seen)
        self.metrics.new_tokens.inc()
        text.tokens, text.seen, text.last = text.tokens + 1, now, token
        if token in self.tokenizer.eos_ids and not request.ignore_eos:
            return self._end_text(text, text.stream.finish(), "stop")
        piece = text.stream.add(token)
        logprobs = text.sampler.logprobs
        self._tell(request, Piece(text.number, piece, token, logprobs[-1] if logprobs else None))
        if text.stream.stopped is not None:
            return self._end_text(text, "", "stop")
        if any(constraint.is_finished for constraint in text.sampler.constraints):
            return self._end_text(text, text.stream.finish(), "stop")
        if text.tokens >= request.new_tokens:
            return self._end_text(text, text.stream.finish(), "length")
        return None

    def _end_text(self, text: _Writing, rest: str, reason: Reason) -> None:
        request = text.request
        self._writing = [other for other in self._writing if other is not text]
        self._reserved -= text.reserved
        self._keep(
            [*request.prompt, *text.sampler.written[: text.caches[0].length - len(request.prompt)]],
            text.caches,
        )
        last = not any(other.request is request for other in self._writing)
        if last:
            with self._lock:
                self._pending -= 1
        self._tell(request, End(text.number, rest, reason, text.tokens))

    def _keep(self, ids: Sequence[int], caches: Caches) -> None:
        self.prefixes.keep(ids, caches, room=self.cache_bytes - self._reserved)


def logprobs_of(logits: Tensor, targets: Sequence[int], alternatives: int) -> list[TokenLogprob]:
    """What (n, V) logits say of `targets` (n), each with its most likely alternatives."""
    logprobs = torch.log_softmax(logits, -1)
    best = logprobs.topk(min(alternatives, logits.shape[-1])) if len(targets) else None
    return [
        TokenLogprob(
            int(target),
            float(logprobs[place, target]),
            tuple(zip(best.indices[place].tolist(), best.values[place].tolist(), strict=True)),  # type: ignore[union-attr]
        )
        for place, target in enumerate(targets)
    ]
