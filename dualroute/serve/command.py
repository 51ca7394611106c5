"""``dualroute serve``: a checkpoint behind OpenAI's API until Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import torch

from dualroute.errors import UserError
from dualroute.evaluate.load import load
from dualroute.files import read_limited
from dualroute.model.steering import steer
from dualroute.serve.config import ServeConfig

log = logging.getLogger(__name__)
_MOST_KEYS_BYTES = 1 << 20


def serve(config: ServeConfig) -> None:
    """Serve until a signal says stop; see the module's docstring.

    Raises:
        UserError: A checkpoint cannot be used, the port is taken, a key file is no key file, or the extra
            `serve` is missing.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(f"dualroute serve needs {error.name}: pip install 'dualroute[serve]'") from error
    from dualroute.serve.api import create_app
    from dualroute.serve.engine import Engine
    from dualroute.serve.jobs import Limits, Served
    from dualroute.serve.metrics import Metrics

    keys = _keys(config.api_key_file)
    listener = _listen(config.host, config.port)
    metrics = Metrics()
    models: list[Served] = []
    paths = [config.checkpoint, *([config.compare] if config.compare else [])]
    for number, path in enumerate(paths):
        loaded = load(path, config.device, config.dtype)
        loaded.model.eval()
        if config.scale and not number:
            steer(loaded.model, config.scale)
        name = config.name if config.name and not number else _name(path)
        if any(name == other.name for other in models):
            name = f"{name}-{number + 1}"
        total = config.cache_gb * 2**30 if config.cache_gb else _free_memory(loaded.device) / 2
        engine = Engine(
            loaded.model,
            loaded.tokenizer,
            max_batch=config.max_batch,
            max_waiting=config.max_waiting,
            cache_bytes=int(total / len(paths)),
            prefix_share=config.prefix_cache,
            prefill_chunk=config.prefill_chunk,
            cache_dtype=config.cache_dtype,
            metrics=metrics,
        )
        models.append(Served(name, engine))
    app = create_app(
        models,
        metrics,
        limits=Limits(config.max_tokens, config.timeout_s),
        keys=keys,
        cors_origins=config.cors_origins,
        most_bytes=int(config.body_mb * 2**20),
        body_seconds=config.body_timeout_s,
    )

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        port = listener.getsockname()[1]
        shown = "localhost" if config.host in ("127.0.0.1", "0.0.0.0", "::") else config.host
        key = "" if keys else "; no API key is asked for"
        log.info(
            "%s",
            f"{', '.join(m.name for m in models)} at http://{shown}:{port}/v1 (page: http://{shown}:{port}/){key}",
        )
        yield

    app.router.lifespan_context = lifespan
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            limit_concurrency=config.max_connections,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(config.shutdown_s) + 1,
            server_header=False,
        )
    )
    # uvicorn stops at the signal, and raises it again once it has: that is no reason to die then
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
        for served in models:
            served.engine.stop()
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound before the model is loaded, so that a taken port shows at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} is in use: stop what listens there, or give another --port"
            ) from error
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): give another --host or --port"
        ) from error
    return listener


def _keys(path: str | None) -> list[str]:
    if path is None:
        given = os.environ.get("DUALROUTE_API_KEY", "")
        return [given] if given else []
    try:
        text = read_limited(path, _MOST_KEYS_BYTES).decode("ascii")
    except UnicodeDecodeError as error:
        raise UserError(f"api_key_file {path} must hold plain ASCII, a key on each line") from error
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        raise UserError(f"api_key_file {path} has no key: write one on a line of its own")
    return keys


def _name(path: str) -> str:
    """What a checkpoint is called: its run's folder."""
    folder = Path(path).resolve()
    return folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
