"""The command: what it says at its start, what it refuses, how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from dualroute.cli import main
from dualroute.data.tokenizer import Tokenizer
from dualroute.model.checkpoint.format import save_model
from tests.serve.conftest import CONTEXT, model_of


@pytest.fixture(scope="module")
def checkpoint(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    save_model(model_of(tokenizer), folder, tokenizer.path, {"step": 1, "context": CONTEXT})
    return folder


def test_what_cannot_be_served_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: object) -> str:
        assert main(["serve", *map(str, words)]) == 2
        return capsys.readouterr().err

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} is in use" in refused(checkpoint, "--port", port)
    assert "port" in refused(checkpoint, "--port", 70000)
    assert "cannot listen on 203.0.113.7" in refused(checkpoint, "--host", "203.0.113.7", "--port", 0)
    assert "nowhere" in refused(tmp_path / "nowhere", "--port", 0)
    (tmp_path / "keys").write_text("\n \n")
    assert "has no key" in refused(checkpoint, "--api_key_file", tmp_path / "keys")
    (tmp_path / "keys").write_bytes(b"\xff\xfe")
    assert "ASCII" in refused(checkpoint, "--api_key_file", tmp_path / "keys")


@pytest.mark.slow
def test_a_signal_ends_it_when_the_texts_are_done(checkpoint: Path) -> None:
    environment = os.environ | {"DUALROUTE_API_KEY": "secret"}
    server = subprocess.Popen(
        [sys.executable, "-m", "dualroute", "serve", str(checkpoint), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    assert server.stdout is not None
    try:
        line = next(line for line in server.stdout if "/v1" in line)
        address = line.split("(page: ")[1].split(")")[0].rstrip("/")
        assert "no API key" not in line
        body = {"model": "tiny", "prompt": "The", "max_tokens": 390, "ignore_eos": True, "stream": True}
        with httpx.stream(
            "POST",
            f"{address}/v1/completions",
            json=body,
            headers={"Authorization": "Bearer secret"},
            timeout=60,
        ) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            assert first.startswith("data: ")
            server.send_signal(signal.SIGTERM)
            text = [first, *lines]
        assert text[-2:] == ["data: [DONE]", ""]
        assert server.wait(30) == 0
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{address}/health")
    finally:
        server.kill()
        server.wait()
