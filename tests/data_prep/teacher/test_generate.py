"""Training text from our own server, and from one that answers as a test wants it."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import PrepareConfig
from data_prep.prepare import prepare
from data_prep.teacher.client import Rate
from data_prep.teacher.config import GenerateDataConfig
from data_prep.teacher.generate import generate_data, prompts_of
from dualroute.data.manifest import Manifest
from dualroute.errors import UserError
from tests.serve.conftest import served, tokenizer  # noqa: F401  # the fixture

Reply = Callable[[int, dict[str, Any]], tuple[int, Any]]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.asked)
            server.asked.append((self.path, body, self.headers.get("Authorization")))
        status, reply = server.reply(number, body)
        content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if status == 429:
            self.send_header("Retry-After", "0.3")
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def said(text: str, finish: str = "stop") -> dict[str, Any]:
    return {
        "choices": [{"message": {"content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 100},
    }


def echo(_: int, body: dict[str, Any]) -> tuple[int, Any]:
    return 200, said(f"answer to {body['messages'][-1]['content']}")


@contextmanager
def scripted(reply: Reply = echo) -> Iterator[Any]:
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.reply, server.lock = [], reply, threading.Lock()
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def config(
    folder: Path, address: str, prompts: str = "one\ntwo\n\nthree\n", **more: Any
) -> GenerateDataConfig:
    path = folder / more.pop("name", "prompts.txt")
    if not path.exists():
        path.write_text(prompts, encoding="utf-8")
    values = {"model": "m", "retries": 3, **more}
    return GenerateDataConfig(server=address, prompts=str(path), output=str(folder / "out.jsonl"), **values)


def records(folder: Path, name: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_our_own_server_writes_what_prepare_reads(
    tmp_path: Path,
    tokenizer: Any,  # noqa: F811
    kind: Any,
) -> None:
    lines = "\n".join(f"The old bird sees stone {number}" for number in range(6))
    with served(tokenizer, "tiny") as address:
        more = {"kind": kind, "max_tokens": 40, "keep_unfinished": True, "samples": 2}
        generate_data(config(tmp_path, address, lines, **{**more, "model": "tiny"}))
    found = records(tmp_path)
    assert len(found) == 12
    assert len({record["key"] for record in found}) == 12
    assert all(record["text"].startswith("The old bird sees stone") for record in found)
    of_one = {record["answer"] for record in found if record["prompt"] == "The old bird sees stone 3"}
    assert len(of_one) == 2, "each sample has a seed of its own"
    assert not list(tmp_path.glob("*.partial"))
    if kind == "chat":
        assert [m["role"] for m in found[0]["messages"]] == ["user", "assistant"]
    prepare(
        PrepareConfig(
            corpus=str(tmp_path / "out.jsonl"),
            output=str(tmp_path / "shards"),
            vocab_size=420,
            reserved_tokens=0,
            val_fraction=0.5,
            progress=False,
        )
    )
    manifest = Manifest.load(tmp_path / "shards")
    assert sum(manifest.split(split).documents for split in ("train", "val")) == 12


def test_a_stopped_run_asks_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")

    def until_three(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        return (401, {"error": {"message": "the key has\nexpired"}}) if number == 3 else echo(number, body)

    prompts = "\n".join(f"prompt {number}" for number in range(8))
    how = {"concurrency": 1, "api_key_variable": "MY_KEY", "system": "Be brief."}
    with scripted(until_three) as server:
        with pytest.raises(UserError, match=r"refuses the key \(401: the key has; expired\).*MY_KEY"):
            generate_data(config(tmp_path, server.address, prompts, **how))
        assert {key for *_, key in server.asked} == {"Bearer secret"}
    partial = tmp_path / "out.jsonl.partial"
    with partial.open("a") as stream:
        stream.write('{"key": "torn')
    with scripted() as server:
        generate_data(config(tmp_path, server.address, prompts, **how, price_in=1.0))
        asked = [body["messages"] for _, body, _ in server.asked]
        assert [messages[-1]["content"] for messages in asked] == [f"prompt {n}" for n in range(3, 8)]
        assert asked[0][0] == {"role": "system", "content": "Be brief."}
        generate_data(config(tmp_path, server.address, prompts, **how))
        assert len(server.asked) == 5, "it is complete"
        with pytest.raises(UserError, match="begun with other prompts or settings"):
            generate_data(config(tmp_path, server.address, prompts, **how, temperature=0.1))
    assert [record["prompt"] for record in records(tmp_path)] == [f"prompt {n}" for n in range(8)]
    assert "secret" not in "".join(path.read_text() for path in tmp_path.iterdir())


def test_what_may_pass_is_tried_again_and_what_may_not_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: dict[str, int] = {}

    def reply(_: int, body: dict[str, Any]) -> tuple[int, Any]:
        prompt = body["messages"][-1]["content"]
        seen[prompt] = seen.get(prompt, 0) + 1
        if prompt == "busy" and seen[prompt] == 1:
            return 429, {"error": {"message": "slow down"}}
        if prompt == "broken" and seen[prompt] < 3:
            return (500, b"") if seen[prompt] == 1 else (200, b"<html>")
        if prompt == "long":
            return 400, {"error": {"message": "context overflow"}}
        return 200, said(f"answer to {prompt}", "length" if prompt == "cut" else "stop")

    caplog.set_level("INFO")
    settings = {"prompts": "busy\nbroken\nlong\ncut\nfine\n", "price_in": 1e4, "price_out": 1e5}
    with scripted(reply) as server:
        began = time.monotonic()
        generate_data(config(tmp_path, server.address, **settings))
        assert time.monotonic() - began > 0.3, "Retry-After is obeyed"
        assert seen == {"busy": 2, "broken": 3, "long": 1, "cut": 1, "fine": 1}
        assert {record["prompt"] for record in records(tmp_path)} == {"busy", "broken", "fine"}
        (failed,) = records(tmp_path, "out.jsonl.failed")
        assert failed["problem"] == "400: context overflow"
        assert [record["prompt"] for record in records(tmp_path, "out.jsonl.unfinished")] == ["cut"]
        line = next(record.message for record in caplog.records if record.message.startswith("3 answers"))
        assert "1 failed, 1 cut off" in line
        assert "40 tokens in and 400 out, cost 40.4, 3 requests sent again" in line
        server.reply = echo
        generate_data(config(tmp_path, server.address, **settings))
        assert [body["messages"][-1]["content"] for _, body, _ in server.asked[8:]] == ["long"]
    assert {record["prompt"] for record in records(tmp_path)} == {"busy", "broken", "fine", "long"}
    assert not (tmp_path / "out.jsonl.failed").exists()


def test_a_budget_ends_the_run_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    prompts = "\n".join(map(str, range(10)))
    how = {"concurrency": 1, "price_out": 1e4}  # an answer costs 1
    with scripted() as server:
        with pytest.raises(UserError, match="the budget of 4 is spent"):
            generate_data(config(tmp_path, server.address, prompts, **how, budget=4.0))
        assert len(server.asked) == 4
        generate_data(config(tmp_path, server.address, prompts, **how, budget=100.0))
    assert len(records(tmp_path)) == 10


def test_a_server_that_is_away_is_given_up(tmp_path: Path) -> None:
    with scripted() as server:
        address = server.address
    prompts = "\n".join(map(str, range(100)))
    with pytest.raises(UserError, match=r"20 requests in a row failed .*Connection refused"):
        generate_data(config(tmp_path, address, prompts, retries=0))
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(("status", "message"), [(404, "no such model"), (302, "Found")])
def test_a_wrong_address_or_model_ends_it_at_once(tmp_path: Path, status: int, message: str) -> None:
    with scripted(lambda *_: (status, {"error": {"message": message}})) as server:
        with pytest.raises(UserError, match=f"does not know the model 'm'.*{message}"):
            generate_data(config(tmp_path, server.address))
        assert len(server.asked) <= 4, "no more than were under way"


def test_prompts_are_lines_or_records(tmp_path: Path) -> None:
    lines = ['{"q": "one"}', '{"messages": [{"role": "user", "content": "two"}]}']
    of_records = config(tmp_path, "http://h", "\n".join(lines), name="p.jsonl", prompt_key="q", samples=2)
    found = list(prompts_of(of_records, Path(of_records.prompts)))
    assert [prompt.messages[-1]["content"] for prompt in found] == ["one", "one", "two", "two"]
    assert [prompt.seed for prompt in found] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("p.jsonl", "{", "p.jsonl:1: it is no JSON"),
        ("p.jsonl", '{"other": 1}', "no text under 'prompt' and no messages: give --prompt_key"),
        ("p.jsonl", '{"messages": [{"role": 1}]}', "messages are tables with a role and a content"),
        ("p.txt", "\udcff", "p.txt:1: it is not UTF-8"),
    ],
)
def test_bad_prompts_name_their_line(tmp_path: Path, name: str, line: str, message: str) -> None:
    (tmp_path / name).write_bytes(line.encode(errors="surrogateescape"))
    bad = config(tmp_path, "http://h", name=name)
    with pytest.raises(UserError, match=message):
        list(prompts_of(bad, Path(bad.prompts)))


@pytest.mark.parametrize("server", ["h:80", "ftp://h", "http://", "http://u:p@h", "http://h:x", "http://a b"])
def test_an_address_that_is_none(server: str) -> None:
    with pytest.raises(UserError, match="server is"):
        GenerateDataConfig(server=server, model="m", prompts="p", output="o")


def test_requests_begin_at_a_steady_rate() -> None:
    rate, stop, began = Rate(60 / 0.02), threading.Event(), time.monotonic()
    for _ in range(6):
        rate.wait(stop)
    assert time.monotonic() - began > 0.09
