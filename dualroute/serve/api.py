"""The application: endpoints of OpenAI's API, health, metrics and the page."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse

from dualroute import __version__
from dualroute.serve import errors
from dualroute.serve.jobs import Limits, Served
from dualroute.serve.metrics import Metrics
from dualroute.serve.middleware import Gate
from dualroute.serve.routes import chat, completions, embeddings, responses
from dualroute.serve.routes.common import State

#: The page loads nothing from elsewhere.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_KINDS = {"page.js": "text/javascript", "page.css": "text/css"}


def create_app(
    models: Sequence[Served],
    metrics: Metrics,
    *,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    most_bytes: int = 8 << 20,
    body_seconds: float = 30.0,
) -> FastAPI:
    """The application that serves ``models``, the first of them by default on the page.

    Args:
        models: Each with its engine.
        metrics: Of the server.
        limits: Of each request.
        keys: API keys; none are asked for where there are none.
        cors_origins: Sites whose pages may ask.
        most_bytes: Of a body.
        body_seconds: In which it must come.
    """
    state = State({served.name: served for served in models}, limits or Limits())
    app = FastAPI(title="dualroute", version=__version__, docs_url=None, redoc_url=None)
    errors.install(app)
    for endpoint in (chat, completions, responses, embeddings):
        app.include_router(endpoint.router(state))

    def described(served: Served) -> dict[str, Any]:
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "dualroute",
            "context_length": served.context,
            "writes": served.writes,
            "chats": served.chats,
        }

    @app.get("/v1/models")
    async def _list() -> Response:
        return JSONResponse({"object": "list", "data": [described(served) for served in models]})

    @app.get("/v1/models/{name:path}")
    async def _one(name: str) -> Response:
        return JSONResponse(described(state.model(name)))

    @app.get("/health")
    async def _health() -> Response:
        alive = all(served.engine.is_alive for served in models)
        load = {served.name: served.engine.load for served in models}
        return JSONResponse({"status": "ok" if alive else "stopping", "models": load}, 200 if alive else 503)

    @app.get("/metrics")
    async def _metrics() -> Response:
        for served in models:
            for name, count in served.engine.load.items():
                if name == "cache_bytes":
                    metrics.cache_bytes.labels(served.name).set(count)
                else:
                    metrics.texts.labels(served.name, name).set(count)
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def _page() -> Response:
        return HTMLResponse(_file("page.html"), headers=_PAGE_HEADERS)

    @app.get("/page/{name}", include_in_schema=False)
    async def _part(name: str) -> Response:
        if name not in _KINDS:
            raise errors.ApiError(404, f"there is nothing at /page/{name[:100]}")
        return Response(_file(name), media_type=_KINDS[name], headers=_PAGE_HEADERS)

    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    app.add_middleware(
        Gate, keys=tuple(keys), most_bytes=most_bytes, body_seconds=body_seconds, metrics=metrics
    )
    return app


def _file(name: str) -> bytes:
    return (files("dualroute.serve") / "page" / name).read_bytes()
