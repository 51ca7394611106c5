"""The options of ``dualroute data generate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from dualroute.errors import UserError
from dualroute.paths import LocalPath
from dualroute.settings import SEEDS, above, at_least, check_fields


@dataclass
class GenerateDataConfig:
    """Have a model behind an OpenAI-compatible API write training text; a stopped run is gone on with.

    Args:
        server: Address, such as http://127.0.0.1:8000 (``dualroute serve``) or https://HOST/v1.
        model: Name of the model there.
        prompts: Text file with a prompt a line, or JSON Lines with ``prompt_key`` or messages.
        output: JSON Lines file to write, which ``dualroute prepare --corpus`` reads.
        kind: chat asks for the answer to a message, completions for what follows a text.
        prompt_key: Of a record of JSON Lines.
        system: What the system says before each chat; empty for nothing.
        text: What a record's text holds: the answer, or prompt and answer.
        samples: Answers to each prompt.
        max_tokens: Of an answer.
        temperature: Of the draw.
        top_p: Share of the likeliest tokens that are drawn from.
        seed: Of the first answer; each has its own.
        keep_unfinished: Also keep answers that were cut off at max_tokens.
        api_key_variable: Environment variable that holds the key; the key itself is written nowhere.
        concurrency: Requests at once.
        requests_per_minute: At most so many begin; null does not wait.
        retries: After an error that may pass (429, 5xx, no connection), with longer and longer waits.
        timeout_seconds: How long a request may take.
        price_in: Of a million tokens of prompts, for the cost that is counted.
        price_out: Of a million tokens of answers.
        budget: Cost at which no further request is sent; null never.
    """

    server: str
    model: str
    prompts: LocalPath
    output: LocalPath
    kind: Literal["chat", "completions"] = "chat"
    prompt_key: str = "prompt"
    system: str = ""
    text: Literal["answer", "both"] = "both"
    samples: int = 1
    max_tokens: int = 512
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    keep_unfinished: bool = False
    api_key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 4
    requests_per_minute: float | None = None
    retries: int = 5
    timeout_seconds: float = 120.0
    price_in: float = 0.0
    price_out: float = 0.0
    budget: float | None = None

    def __post_init__(self) -> None:
        ranges = {
            "samples": at_least(1, 10_000),
            "max_tokens": at_least(1, 2**20),
            "temperature": at_least(0, 10),
            "top_p": above(0, 1),
            "seed": SEEDS,
            "concurrency": at_least(1, 256),
            "requests_per_minute": above(0, 1e6),
            "retries": at_least(0, 100),
            "timeout_seconds": above(0, 86_400),
            "budget": above(0),
        }
        check_fields(self, "", ranges, may_be_empty=("system",))
        try:
            parts = urlsplit(self.server)
            fits = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
            _ = parts.port  # which raises where it is no number
        except ValueError:
            fits = False
        if not fits or any(ord(character) <= 32 for character in self.server):
            raise UserError(f"server is {self.server!r}: give an address such as http://127.0.0.1:8000")
        if self.budget is not None and not (self.price_in or self.price_out):
            raise UserError("budget is given, but price_in and price_out are 0: give what tokens cost")

    @property
    def address(self) -> str:
        """Of the requests."""
        base = self.server.rstrip("/")
        base = base if base.endswith("/v1") else f"{base}/v1"
        return f"{base}/{'chat/completions' if self.kind == 'chat' else 'completions'}"
