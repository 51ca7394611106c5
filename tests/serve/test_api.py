"""The endpoints as OpenAI's own client and a careless one see them."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch

from dualroute.data.tokenizer import Tokenizer
from dualroute.model import SamplingConfig
from dualroute.model.decoding.generation import generate
from dualroute.serve import jobs
from dualroute.serve.jobs import Limits
from tests.serve.conftest import model_of, served


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def written(tokenizer: Tokenizer, prompt: list[int], new: int, seed: int = 0) -> str:
    """What the model alone writes."""
    ids = []
    for token in generate(
        model_of(tokenizer), prompt, SamplingConfig(new, temperature=1, top_p=1, seed=seed)
    ):
        if token in tokenizer.eos_ids:
            break
        ids.append(token)
    return tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("other").owned_by == "dualroute"
    with pytest.raises(openai.NotFoundError, match="did you mean 'tiny'"):
        client.models.retrieve("tinny")


def test_completions_are_those_of_the_model(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    prompts = ["The old stone", "A bird"]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=12, n=2, seed=3)
    wanted = [written(tokenizer, tokenizer.encode(p, bos=True), 12, 3 + n) for p in prompts for n in range(2)]
    assert [choice.text for choice in answer.choices] == wanted
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(tokenizer.encode(p, bos=True)) for p in prompts)
    pieces: dict[int, str] = dict.fromkeys(range(4), "")
    used, reasons = None, {}
    for part in client.completions.create(
        model="tiny",
        prompt=prompts,
        max_tokens=12,
        n=2,
        seed=3,
        stream=True,
        stream_options={"include_usage": True},
    ):
        used = part.usage or used
        for choice in part.choices:
            pieces[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert list(pieces.values()) == wanted
    assert [reasons[n] for n in range(4)] == [choice.finish_reason for choice in answer.choices]
    assert used is not None
    assert used.completion_tokens == answer.usage.completion_tokens
    ids = tokenizer.encode(prompts[0], bos=True)
    again = client.completions.create(model="tiny", prompt=ids, max_tokens=12, seed=3)
    assert again.choices[0].text == wanted[0]


def test_log_probabilities_are_the_models(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.completions.create(
        model="tiny", prompt="The old stone", max_tokens=4, temperature=0, logprobs=2, echo=True
    )
    ids = tokenizer.encode("The old stone", bos=True)
    logs = answer.choices[0].logprobs
    assert logs is not None
    assert logs.token_logprobs is not None
    assert answer.choices[0].text.startswith("The old stone")
    greedy = list(generate(model_of(tokenizer), ids, SamplingConfig(4, temperature=0)))
    whole = [*ids, *greedy]
    with torch.no_grad():
        says = model_of(tokenizer)(torch.tensor([whole]))[0].log_softmax(-1)
    wanted = [float(says[place, token]) for place, token in enumerate(whole[1:])]
    assert logs.token_logprobs[0] is None
    np.testing.assert_allclose(np.array(logs.token_logprobs[1:], float), wanted, atol=1e-4)
    assert logs.top_logprobs is not None
    assert len(logs.top_logprobs[-1]) == 2
    assert logs.text_offset is not None
    scored = client.completions.create(model="tiny", prompt=whole, max_tokens=0, logprobs=0, echo=True)
    again = scored.choices[0].logprobs
    assert again is not None
    assert again.token_logprobs is not None
    np.testing.assert_allclose(np.array(again.token_logprobs[1:], float), wanted, atol=1e-4)
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=3,
        logprobs=True,
        top_logprobs=3,
    )
    content = chat.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    assert all(len(one.top_logprobs) == 3 and one.logprob <= 0 for one in content.content)
    assert bytes(content.content[0].bytes or []).decode(errors="replace") == content.content[0].token


def test_a_chat_goes_through_the_template(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "The old "}, {"type": "text", "text": "stone"}],
        },
    ]
    ids = tokenizer.chat(
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "The old stone"}],
        add_generation_prompt=True,
    ).ids
    wanted = written(tokenizer, ids, 15, 5)
    answer = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=15, seed=5)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == wanted
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=15, seed=5, stream=True
    )  # type: ignore[call-overload]
    deltas = [part.choices[0].delta for part in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == wanted
    response = client.responses.create(
        model="tiny",
        instructions="be brief",
        input="The old stone",
        max_output_tokens=15,
        extra_body={"seed": 5},
    )
    assert response.output_text == wanted
    kinds, text = [], ""
    with client.responses.stream(
        model="tiny",
        instructions="be brief",
        input="The old stone",
        max_output_tokens=16,
        extra_body={"seed": 5},
    ) as events:
        for event in events:
            kinds.append(event.type)
            text += event.delta if event.type == "response.output_text.delta" else ""
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert text.startswith(wanted[:-1])


def test_texts_stop_at_strings_and_fit_schemas(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    whole = written(tokenizer, tokenizer.encode("The", bos=True), 40, 1)
    stop = whole[len(whole) // 2 :][:4]
    answer = client.completions.create(
        model="tiny", prompt="The", max_tokens=40, seed=1, stop=[stop, "\0never"]
    )
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    pytest.importorskip("llguidance", reason="pip install -e '.[control]'")
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2, 3]}}, "required": ["n"]} | {
        "additionalProperties": False
    }
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "a number"}],
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "one", "schema": schema}},
    )
    assert json.loads(chat.choices[0].message.content or "")["n"] in (1, 2, 3)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "a number"}],
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nothing"}},
            },
        )


def test_embeddings_are_means_of_the_last_states(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    texts = ["The old stone", "A bird sees a house and a hill"]
    vectors = [one.embedding for one in client.embeddings.create(model="tiny", input=texts).data]
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            states = model_of(tokenizer).hidden_states(torch.tensor([tokenizer.encode(text, bos=True)]))[0]
        wanted = states.mean(0) / states.mean(0).norm()
        np.testing.assert_allclose(np.array(vector), wanted.numpy(), atol=1e-5)
    with httpx.Client(base_url=str(client.base_url)) as http:
        body = {"model": "tiny", "input": texts[0], "encoding_format": "base64"}
        coded = http.post("embeddings", json=body).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(coded), "<f4"), vectors[0], atol=1e-6)


LONG = "x" * 3000
WRONG = [
    ("completions", "{", "not JSON"),
    ("completions", {"prompt": "a"}, "model"),
    ("completions", {"model": "nobody", "prompt": "a"}, "no model 'nobody'"),
    ("completions", {"model": "tiny", "prompt": "a", "max_tokens": -1}, "max_tokens"),
    ("completions", {"model": "tiny", "prompt": "a", "max_tokens": 10**9}, "context of 400"),
    ("completions", {"model": "tiny", "prompt": LONG}, "context 400"),
    ("completions", {"model": "tiny", "prompt": []}, "prompt"),
    ("completions", {"model": "tiny", "prompt": [999_999]}, "999999"),
    ("completions", {"model": "tiny", "prompt": "a", "temperature": float("inf")}, "temperature"),
    ("completions", {"model": "tiny", "prompt": "a", "temperature": 3}, "temperature"),
    ("completions", {"model": "tiny", "prompt": "a", "n": 10**9}, "n"),
    ("completions", {"model": "tiny", "prompt": "a", "suffix": "b"}, "suffix"),
    ("completions", {"model": "tiny", "prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    ("completions", {"model": "tiny", "prompt": "a", "logit_bias": {"99999": 1}}, "99999"),
    ("completions", {"model": "tiny", "prompt": "a", "stream_options": {}}, "stream"),
    ("chat/completions", {"model": "tiny", "messages": []}, "messages"),
    ("chat/completions", {"model": "tiny", "messages": [{"role": "user"}] * 2}, "messages"),
    ("chat/completions", {"model": "tiny", "messages": [{"role": "king", "content": "a"}]}, "role"),
    (
        "chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "tools": [1]},
        "tools",
    ),
    ("responses", {"model": "tiny", "input": "a", "previous_response_id": "b"}, "previous_response_id"),
    ("embeddings", {"model": "tiny", "input": ""}, "input"),
    ("embeddings", {"model": "tiny", "input": ["a", LONG]}, "input"),
    ("embeddings", {"model": "tiny", "input": "a", "dimensions": 5}, "dimensions"),
]


@pytest.mark.parametrize(("path", "body", "words"), WRONG)
def test_what_cannot_be_answered_is_refused_in_openais_form(
    address: str, path: str, body: object, words: str
) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    answer = httpx.post(f"{address}/v1/{path}", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert answer.headers["x-request-id"]


def test_paths_methods_and_ids(address: str) -> None:
    for answer, status in (
        (httpx.get(f"{address}/v1/nothing"), 404),
        (httpx.get(f"{address}/v1/completions"), 405),
        (httpx.get(f"{address}/page/../engine.py"), 404),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["type"].endswith("_error")
    given = httpx.get(f"{address}/health", headers={"X-Request-Id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    forged = httpx.get(f"{address}/health", headers={"X-Request-Id": "a b" * 100})
    assert forged.headers["x-request-id"].startswith("req_")
    assert given.json()["status"] == "ok"
    page = httpx.get(f"{address}/metrics").text
    assert 'dualroute_requests_total{path="/health",status="200"}' in page
    assert "dualroute_generated_tokens_total" in page
    assert (
        "access-control-allow-origin"
        not in httpx.get(f"{address}/health", headers={"Origin": "http://a"}).headers
    )


def test_the_page_loads_nothing_from_elsewhere(address: str) -> None:
    page = httpx.get(address)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http-equiv", "")
    for name in ("page.js", "page.css"):
        assert f"/page/{name}" in page.text
        assert httpx.get(f"{address}/page/{name}").status_code == 200
    assert "innerHTML" not in httpx.get(f"{address}/page/page.js").text


def test_the_page_shows_the_models_in_a_browser(address: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: the page is not looked at")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    shown = subprocess.run(
        [*command, "--virtual-time-budget=5000", "--dump-dom", address],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    assert "<option>tiny</option><option>other</option>" in shown
    assert '<section class="pane"><h2>tiny</h2></section>' in shown
    assert '<label id="beside-label">' in shown  # two models may be shown side by side


def test_no_answer_holds_what_another_asked(address: str) -> None:
    """Forty clients at once, each with a word of its own, echoed back."""

    def ask(number: int) -> None:
        marker = f"marker{number:03d}"
        body = {"model": "tiny", "prompt": f"The {marker}", "max_tokens": 8, "echo": True, "seed": number}
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        assert marker in answer.text
        others = {f"marker{other:03d}" for other in range(40)} - {marker}
        assert not any(other in answer.text for other in others)

    with ThreadPoolExecutor(40) as pool:
        list(pool.map(ask, range(40)))


def test_clients_that_vanish_or_are_slow_leave_room_for_others(address: str) -> None:
    body = json.dumps(
        {"model": "other", "prompt": "The", "max_tokens": 390, "stream": True, "ignore_eos": True}
    )
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    host, port = address.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port))) as one:
            one.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            one.recv(100)
    half = socket.create_connection((host, int(port)))
    half.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())  # and nothing more
    began = time.monotonic()
    load = {}
    while time.monotonic() < began + 30:
        load = httpx.get(f"{address}/health").json()["models"]["other"]
        if not load["writing"] + load["waiting"] + load["reading"]:
            break
        time.sleep(0.02)
    half.close()
    assert load["writing"] == 0
    answer = httpx.post(f"{address}/v1/completions", json={"model": "other", "prompt": "The"}, timeout=60)
    assert answer.status_code == 200


def test_a_client_that_goes_away_is_no_failure_of_the_server(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_POLL", 0.01)
    body = {"model": "other", "prompt": "The", "max_tokens": 390, "ignore_eos": True}
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{address}/v1/completions", json=body, timeout=0.05)
    gone = 'dualroute_requests_total{path="/v1/completions",status="499"}'
    end = time.monotonic() + 30
    while gone not in (page := httpx.get(f"{address}/metrics").text) and time.monotonic() < end:
        time.sleep(0.05)
    assert gone in page
    assert 'status="500"' not in page
    assert 'status="0"' not in page


@pytest.fixture(scope="module")
def strict(tokenizer: Tokenizer) -> Iterator[str]:
    """A server that asks for keys and allows little."""
    engine = {"max_batch": 1, "max_waiting": 1}
    allowed = {"keys": ["key-1", "key-2"], "cors_origins": ["http://site"], "limits": Limits(300, 60)}
    with served(tokenizer, "tiny", engine=engine, most_bytes=2000, body_seconds=0.5, **allowed) as where:
        yield where


def test_keys(strict: str) -> None:
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic key-1"}):
        answer = httpx.get(f"{strict}/v1/models", headers=header)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    for key in ("key-1", "key-2"):
        assert httpx.get(f"{strict}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert httpx.get(f"{strict}/health").status_code == 200
    asked = {"Origin": "http://site", "Access-Control-Request-Method": "POST"}
    allowed = httpx.options(f"{strict}/v1/completions", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "http://site"
    other = httpx.options(f"{strict}/v1/completions", headers=asked | {"Origin": "http://elsewhere"})
    assert "access-control-allow-origin" not in other.headers


def test_limits(strict: str) -> None:
    key = {"Authorization": "Bearer key-1", "Content-Type": "application/json"}
    url = f"{strict}/v1/completions"
    large = httpx.post(url, content=b"x" * 3000, headers=key)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    grows = httpx.post(url, content=(b"x" * 100 for _ in range(100)), headers=key)
    assert grows.status_code == 413
    host, port = strict.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        head = (
            "POST /v1/completions HTTP/1.1",
            "Host: a",
            "Authorization: Bearer key-1",
            "Content-Length: 9",
        )
        slow.sendall("\r\n".join([*head, "", ""]).encode())
        assert b"408" in slow.recv(100)
    body = {"model": "tiny", "prompt": "The", "max_tokens": 301}
    assert "300" in httpx.post(url, json=body, headers=key).json()["error"]["message"]

    async def crowd() -> list[int]:
        async with httpx.AsyncClient(headers=key, timeout=60) as http:
            body = {"model": "tiny", "prompt": "The", "max_tokens": 150, "ignore_eos": True}
            return [
                one.status_code
                for one in await asyncio.gather(*(http.post(url, json=body) for _ in range(8)))
            ]

    found = asyncio.run(crowd())
    assert set(found) == {200, 429}
    assert found.count(200) >= 2


def test_a_prompt_that_is_given_up_says_so(tokenizer: Tokenizer) -> None:
    with served(tokenizer, "tiny", limits=Limits(timeout_s=0.001)) as where:
        body = {"model": "tiny", "prompt": "The", "max_tokens": 300, "ignore_eos": True}
        answer = httpx.post(f"{where}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 504
        streamed = httpx.post(f"{where}/v1/completions", json=body | {"stream": True}, timeout=60).text
        assert json.loads(streamed.split("data: ")[-1])["error"]["code"] == "timeout"


def test_numbers_of_an_answer_are_finite(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="The", max_tokens=5, logprobs=20, logit_bias={"7": -100, "8": 100}
    )
    logs = answer.choices[0].logprobs
    assert logs is not None
    assert all(math.isfinite(value) for value in logs.token_logprobs or [] if value is not None)
