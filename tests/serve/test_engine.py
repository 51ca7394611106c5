"""Continuous batching: a text is the same beside others as alone, whenever it joins and leaves."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, SamplingConfig
from dualroute.model.decoding.batched import copied, held_bytes, new_text, next_logits, num_bytes
from dualroute.model.decoding.generation import generate
from dualroute.model.decoding.sampler import Sampler
from dualroute.serve.engine import Engine
from dualroute.serve.events import Busy, End, Event, Failure, Piece, PromptRead, Request
from tests.serve.conftest import CONTEXT, model_of

PROMPTS = [list(range(5, 5 + length)) for length in (3, 90, 17, 40)]


class Heard:
    """A listener that waits for the end of a request."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.left = 1

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.left -= isinstance(event, End)
        if isinstance(event, Failure) or not self.left:
            self.done.put(None)

    def wait(self) -> Heard:
        self.done.get(timeout=60)
        return self

    def tokens(self, number: int = 0) -> list[int]:
        return [event.token for event in self.events if isinstance(event, Piece) and event.number == number]


def asked(
    prompt: list[int], new: int = 20, texts: int = 1, seed: int = 0, **more: Any
) -> tuple[Request, Heard]:
    heard = Heard()
    heard.left = texts
    samplers = [Sampler(SamplingConfig(new, temperature=1.0, seed=seed + n), prompt) for n in range(texts)]
    return Request(prompt, new, samplers, heard, ignore_eos=True, **more), heard


@contextmanager
def engine_of(model: DualRoutingTransformer, tokenizer: Tokenizer, **more: Any) -> Iterator[Engine]:
    engine = Engine(model, tokenizer, **more)
    try:
        yield engine
    finally:
        engine.stop()


def alone(model: DualRoutingTransformer, prompt: list[int], new: int = 20, seed: int = 0) -> list[int]:
    return list(generate(model, prompt, SamplingConfig(new, temperature=1.0, seed=seed)))


@pytest.mark.parametrize(
    "options", [{}, {"attention": "dense"}, {"qk_norm": True, "gate": True, "qkv_bias": True}]
)
def test_logits_of_several_texts_are_those_of_each_alone(
    tokenizer: Tokenizer, each_kernels: str, options: dict[str, Any]
) -> None:
    model = model_of(tokenizer, **options).double()
    texts, wanted = [], []
    with torch.no_grad():
        for prompt in PROMPTS:
            caches = new_text(model, len(prompt) + 4)
            model.hidden_states(torch.tensor([prompt]), caches=caches)
            texts.append(caches)
            wanted.append(model(torch.tensor([[*prompt, 7, 8]]))[0, -2:])
    first = next_logits(model, [7] * len(texts), texts)
    again = [copied(model, text, 200) for text in texts]  # go on for themselves
    second = next_logits(model, [8] * len(texts), texts)
    torch.testing.assert_close(torch.stack([first, second], 1), torch.stack(wanted))
    torch.testing.assert_close(next_logits(model, [8] * len(texts), again), second)


def test_memory_is_known_before_it_is_taken(tokenizer: Tokenizer) -> None:
    model = model_of(tokenizer)
    for kept in ("auto", "int8", "int4"):
        assert num_bytes(model, 100, cache_dtype=kept) == held_bytes(new_text(model, 100, cache_dtype=kept))
    assert num_bytes(model, 100, cache_dtype="int8") < num_bytes(model, 100) < num_bytes(model, 300)


def test_texts_beside_others_are_those_alone(tokenizer: Tokenizer) -> None:
    model = model_of(tokenizer)
    wanted = [alone(model, prompt, seed=number) for number, prompt in enumerate(PROMPTS)]
    with engine_of(model, tokenizer, prefill_chunk=7, max_batch=3) as engine:
        jobs = [asked(prompt, seed=number) for number, prompt in enumerate(PROMPTS)]
        for request, _ in jobs:
            engine.submit(request)
        got = [heard.wait().tokens() for _, heard in jobs]
        several, heard = asked(PROMPTS[1], texts=2)
        engine.submit(several)
        heard.wait()
    assert got == wanted
    assert len({tuple(text) for text in wanted}) == len(wanted)
    assert heard.tokens(0) == alone(model, PROMPTS[1], seed=0)
    assert heard.tokens(1) == alone(model, PROMPTS[1], seed=1)


def test_what_was_read_is_not_read_again(tokenizer: Tokenizer) -> None:
    model = model_of(tokenizer)
    with engine_of(model, tokenizer, prefill_chunk=50) as engine:
        first, heard = asked(PROMPTS[1])
        engine.submit(first)
        longer = [*PROMPTS[1], *heard.wait().tokens()[:-1], 9, 10, 11]
        for prompt, held in ((longer, len(longer) - 3), (longer[:-30], 0), ([*longer, 5], len(longer))):
            request, heard = asked(prompt)
            engine.submit(request)
            assert heard.wait().tokens() == alone(model, prompt)
            (read,) = (event for event in heard.events if isinstance(event, PromptRead))
            assert read.cached in ((held,) if held != len(longer) else (held - 3, held))
    with engine_of(model, tokenizer, prefix_share=0.0) as engine:
        for _ in range(2):
            request, heard = asked(PROMPTS[1])
            engine.submit(request)
            heard.wait()
        assert len(engine.prefixes) == 0


def test_a_request_waits_for_memory_and_is_refused_where_it_never_fits(tokenizer: Tokenizer) -> None:
    model = model_of(tokenizer)
    one = num_bytes(model, 110)
    with engine_of(model, tokenizer, cache_bytes=2 * one + 100, prefix_share=0.5) as engine:
        jobs = [asked(PROMPTS[1], seed=number) for number in range(5)]
        most = 0
        for request, _ in jobs:
            engine.submit(request)
        for number, (_, heard) in enumerate(jobs):
            while heard.done.empty():
                most = max(most, engine.load["cache_bytes"])
                time.sleep(0.001)
            assert heard.wait().tokens() == alone(model, PROMPTS[1], seed=number)
        assert 0 < most <= 2 * one + 100
        request, _ = asked(PROMPTS[1], new=20, texts=3)
        with pytest.raises(UserError, match="cache_gb"):
            engine.submit(request)
        request, _ = asked(PROMPTS[1], new=CONTEXT)
        with pytest.raises(UserError, match=f"context of {CONTEXT}"):
            engine.submit(request)


def test_nobody_waits_for_a_request_that_was_given_up(tokenizer: Tokenizer) -> None:
    model = model_of(tokenizer)
    with engine_of(model, tokenizer, max_batch=1, max_waiting=1) as engine:
        gone, _ = asked([1, 2, 3], new=CONTEXT - 3)
        engine.submit(gone)
        late, late_heard = asked([1, 2, 3], deadline=time.monotonic() + 0.05)
        engine.submit(late)
        with pytest.raises(Busy, match="2 requests"):
            engine.submit(asked([1, 2, 3])[0])
        (failure,) = late_heard.wait().events
        assert isinstance(failure, Failure)
        assert failure.kind == "timeout"
        gone.cancelled.set()
        request, heard = asked([1, 2, 3])
        engine.submit(request)
        assert heard.wait().tokens() == alone(model, [1, 2, 3])
        assert engine.load == {"waiting": 0, "reading": 0, "writing": 0, "cache_bytes": engine.prefixes.bytes}


def test_a_broken_model_and_a_broken_listener_stop_nobody_else(tokenizer: Tokenizer) -> None:
    model = model_of(tokenizer)
    with engine_of(model, tokenizer) as engine:

        def breaks(event: Event) -> None:
            raise RuntimeError("the loop is closed")

        engine.submit(Request([1, 2], 5, [Sampler(SamplingConfig(5))], breaks))
        request, heard = asked([1, 2, 3])
        engine.submit(request)
        assert len(heard.wait().tokens()) == 20
        with torch.no_grad():
            model.norm.weight[0] = float("nan")
        request, heard = asked([1, 2, 3])
        engine.submit(request)
        failure = heard.wait().events[-1]
        assert isinstance(failure, Failure)
        assert failure.kind == "server"
        assert "not finite" in failure.message
        with torch.no_grad():
            model.norm.weight[0] = 1.0

        class Odd(Sampler):
            def draw(self, logits: torch.Tensor) -> int:
                raise IndexError("of this text alone")

        broken, told = Heard(), asked([1, 2, 3])
        engine.submit(Request([1, 2], 5, [Odd(SamplingConfig(5))], broken))
        engine.submit(told[0])
        failure = broken.wait().events[-1]
        assert isinstance(failure, Failure)
        assert "IndexError" in failure.message
        assert len(told[1].wait().tokens()) == 20
        assert engine.call(lambda: 5).result(10) == 5
        with pytest.raises(ZeroDivisionError):
            engine.call(lambda: 1 // 0).result(10)
        assert engine.is_alive


def test_the_end_lets_texts_finish_for_a_while_and_tells_the_others(tokenizer: Tokenizer) -> None:
    model = model_of(tokenizer)
    engine = Engine(model, tokenizer)
    short, heard = asked([1, 2, 3])
    engine.submit(short)
    stopper = threading.Thread(target=engine.stop, args=(30,))
    stopper.start()
    assert heard.wait().tokens() == alone(model, [1, 2, 3])
    stopper.join(30)
    with pytest.raises(Busy, match="stopped"):
        engine.submit(asked([1, 2, 3])[0])
    with pytest.raises(Busy, match="stopped"):
        engine.call(lambda: 1)
    engine = Engine(model, tokenizer)
    long, heard = asked([1, 2, 3], new=CONTEXT - 3)
    engine.submit(long)
    engine.stop()
    assert heard.wait().events[-1] == Failure("the server was stopped", "shutdown")
    assert not engine.is_alive
