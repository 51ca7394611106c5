"""A model that serves, in this process, on a port that was free."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dualroute.data.tokenizer import Tokenizer
from dualroute.model import DualRoutingTransformer, ModelConfig

pytest.importorskip("fastapi", reason="pip install 'dualroute[serve]'")

from dualroute.serve.api import create_app
from dualroute.serve.engine import Engine
from dualroute.serve.jobs import Served
from dualroute.serve.metrics import Metrics

CONTEXT = 400


def model_of(tokenizer: Tokenizer, **more: Any) -> DualRoutingTransformer:
    """An untrained model whose texts differ from prompt to prompt."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "dim": 32,
        "num_layers": 2,
        "num_heads": 4,
        "window": 8,
        "block": 16,
        "top_k": 1,
    }
    config |= {"max_context": CONTEXT, "vocab_size": tokenizer.vocab_size}
    model = DualRoutingTransformer(ModelConfig(**config | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(scope="session")
def tokenizer(tiny_dataset: Path) -> Tokenizer:
    return Tokenizer(tiny_dataset / "tokenizer.model")


@contextmanager
def served(
    tokenizer: Tokenizer, *names: str, engine: dict[str, Any] | None = None, **app: Any
) -> Iterator[str]:
    """Models of these names at the address that is given."""
    import uvicorn

    metrics = Metrics()
    models = [
        Served(name, Engine(model_of(tokenizer), tokenizer, metrics=metrics, **engine or {}))
        for name in names
    ]
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(models, metrics, **app), log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        for model in models:
            model.engine.stop()
        listener.close()


@pytest.fixture(scope="module")
def address(tokenizer: Tokenizer) -> Iterator[str]:
    """One server for the tests of a file."""
    with served(tokenizer, "tiny", "other") as where:
        yield where
