"""The options of ``dualroute serve``.  No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dualroute.errors import UserError
from dualroute.paths import LocalPath
from dualroute.settings import above, at_least, check_fields


@dataclass
class ServeConfig:
    """Answer over HTTP as OpenAI's API does.

    Args:
        checkpoint: A run folder (its newest finished checkpoint) or a checkpoint folder.
        name: What requests call it; null takes the folder's name.
        compare: A second one, served beside the first under its folder's name; the page shows both.
        host: Address to listen on; 0.0.0.0 is every one of the machine.
        port: TCP port.
        api_key_file: Requests must bring one of the keys in this file, a line each; null asks for none.
        cors_origins: Web sites whose pages may ask, or "*"; none by default.
        max_batch: Texts that are written at the same time.
        max_waiting: Requests that may wait for a place; more are refused with status 429.
        cache_gb: Memory for keys and values, GiB; null takes half of what is free at the start.
        prefix_cache: Share of it that may hold texts which are done, for requests that begin like them.
        prefill_chunk: Tokens of a prompt that are read between two steps of the others.
        max_tokens: Most that a request may ask for; null is the model's context.
        timeout_s: Seconds after which a request is given up.
        body_mb: Size of a request, MiB.
        body_timeout_s: Seconds in which it must have arrived.
        max_connections: At the same time; more are refused with status 503.
        shutdown_s: Seconds that running requests have to finish when the server is stopped.
        scale: Heads to switch off or to scale, as ROUTE.LAYER.HEAD=FACTOR with commas between; of the first
            model alone.
        cache_dtype: How the global route keeps complete blocks: auto is the arithmetic's type, or int8, int4.
        device: auto, cpu, cuda, ….
        dtype: Arithmetic of the model; auto is float32, or what the kernels of its weights need.
    """

    checkpoint: LocalPath
    name: str | None = None
    compare: LocalPath | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: LocalPath | None = None
    cors_origins: list[str] = field(default_factory=list)
    max_batch: int = 16
    max_waiting: int = 128
    cache_gb: float | None = None
    prefix_cache: float = 0.25
    prefill_chunk: int = 256
    max_tokens: int | None = None
    timeout_s: float = 600.0
    body_mb: float = 8.0
    body_timeout_s: float = 30.0
    max_connections: int = 1024
    shutdown_s: float = 30.0
    scale: str | None = None
    cache_dtype: Literal["auto", "int8", "int4"] = "auto"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        ranges = dict.fromkeys(("max_batch", "prefill_chunk", "max_tokens", "max_connections"), at_least(1))
        ranges |= dict.fromkeys(("cache_gb", "timeout_s", "body_mb", "body_timeout_s"), above(0))
        ranges |= {"port": at_least(0, 65535), "prefix_cache": at_least(0, 0.9)}
        check_fields(self, "", ranges)
        if self.name is not None and (not self.name.isprintable() or len(self.name) > 200):
            raise UserError("name must be printable, and at most 200 characters")
