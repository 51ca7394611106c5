"""Requests made from the schema that the server gives of itself: no answer is a failure of the server."""

from __future__ import annotations

import pytest

pytest.importorskip("schemathesis", reason="pip install 'dualroute[dev]'")

import schemathesis
from hypothesis import HealthCheck, given, settings

from dualroute.data.tokenizer import Tokenizer
from dualroute.serve.api import create_app
from dualroute.serve.engine import Engine
from dualroute.serve.jobs import Limits, Served
from dualroute.serve.metrics import Metrics
from tests.serve.conftest import model_of


@pytest.mark.slow
def test_no_request_breaks_the_server(tokenizer: Tokenizer) -> None:
    metrics = Metrics()
    served = Served("tiny", Engine(model_of(tokenizer), tokenizer, metrics=metrics))
    app = create_app([served], metrics, limits=Limits(max_tokens=8, timeout_s=20))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    tried = 0

    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        def ask(case: schemathesis.Case) -> None:
            nonlocal tried
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "tiny"
            answer = case.call()
            tried += 1
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

        ask()
    assert tried >= 100
    assert served.engine.is_alive
    served.engine.stop()
