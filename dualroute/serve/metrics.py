"""What a monitoring system reads from ``/metrics`` (Prometheus)."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"dualroute_{name}", text, labels, registry=self.registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"dualroute_{name}_seconds", text, registry=self.registry, buckets=_SECONDS)

        self.requests = counter("requests", "Requests by path and status", ("path", "status"))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = counter("cached_prompt_tokens", "Those that a kept text saved reading")
        self.new_tokens = counter("generated_tokens", "Tokens written")
        self.waited = seconds("queue", "Until a request was let in")
        self.first_token = seconds("time_to_first_token", "From a request to its first token")
        self.next_token = seconds("time_per_output_token", "Between two tokens of a text")
        self.texts = Gauge(
            "dualroute_texts", "Requests and texts by state", ("model", "state"), registry=self.registry
        )
        self.cache_bytes = Gauge(
            "dualroute_cache_bytes", "Keys and values", ("model",), registry=self.registry
        )

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
