"""When an alert is raised, and what becomes of it where nobody answers."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dualroute.training.monitoring.config import MonitorConfig
from dualroute.training.monitoring.metrics_log import read_metrics
from dualroute.training.monitoring.monitor import Monitor
from dualroute.training.monitoring.outlets.alerts import Alert, Alerts, Webhook


def kinds(alerts: list[Alert]) -> list[str]:
    return [alert.kind for alert in alerts]


def test_a_spike_is_raised_once_and_again_after_it_was_over() -> None:
    alerts = Alerts(MonitorConfig())
    assert alerts.after_step(1, {"loss": 2.0, "skipped": 0.0}) == []
    (alert,) = alerts.after_step(2, {"skipped": 1.0}, "the loss 9 is above 3, the limit from recent steps")
    assert alert == Alert(
        "spike", 2, "step 2 was skipped: the loss 9 is above 3, the limit from recent steps"
    )
    assert alerts.after_step(3, {"skipped": 1.0}) == []
    assert alerts.after_step(4, {"skipped": 0.0}) == []
    assert kinds(alerts.after_step(5, {"skipped": 1.0})) == ["spike"]


def test_waiting_for_data_counts_in_two_readings_in_a_row() -> None:
    alerts = Alerts(MonitorConfig(alert_data_wait=0.05))
    assert alerts.after_reading(1, 0.9, 100.0) == [], "the first one has the start in it"
    assert alerts.after_reading(2, 0.2, 10.0) == []
    assert alerts.after_reading(3, 0.01, 10.0) == []
    assert alerts.after_reading(4, 0.2, 10.0) == []
    (alert,) = alerts.after_reading(5, 0.06, 10.0)
    assert alert.text.startswith("6% of the time is spent waiting for data (monitor.alert_data_wait 0.05)")
    assert alerts.after_reading(6, 0.5, 10.0) == []


def test_milliseconds_of_waiting_and_a_limit_of_zero_are_nothing() -> None:
    for config, seconds in ((MonitorConfig(), 0.5), (MonitorConfig(alert_data_wait=0.0), 100.0)):
        alerts = Alerts(config)
        assert not any(alerts.after_reading(step, 0.9, seconds) for step in range(5))


def test_layers_whose_router_collapsed_are_named() -> None:
    alerts = Alerts(MonitorConfig(alert_router_entropy=0.05))
    values = {f"router/router_entropy/layer_{n:02d}": 0.01 * n for n in range(12)}
    values |= {"router/router_entropy/mean": 0.0, "router/mass_far/layer_00": 0.0}
    (alert,) = alerts.after_router(7, values)
    assert "layer_00 (0.000), layer_01 (0.010)" in alert.text
    assert "layer_05" not in alert.text
    assert Alerts(MonitorConfig(alert_router_entropy=0.0)).after_router(7, values) == []


class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.received.append((self.path, self.headers["Content-Type"], json.loads(body)))
        self.send_response(server.status)
        self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def receiver(status: int = 200) -> Iterator[Any]:
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.received, server.status = [], status
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def address(server: Any) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/hook/secret"


def test_alerts_arrive_in_order_as_small_json() -> None:
    with receiver() as server:
        hook = Webhook(address(server), 5.0, Path("runs/first"))
        for step in (3, 4):
            hook.send(Alert("spike", step, f"step {step} was skipped"))
        hook.close()
        assert [body["step"] for *_, body in server.received] == [3, 4]
        path, kind, body = server.received[0]
        assert (path, kind) == ("/hook/secret", "application/json")
        assert body["text"] == "first: step 3 was skipped"
        assert (body["run"], body["kind"], body["host"]) == ("first", "spike", socket.gethostname())


@pytest.mark.parametrize(("status", "said"), [(500, "Internal Server Error"), (302, "Found")])
def test_an_answer_that_is_an_error_is_one_warning_without_the_secret(
    status: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with receiver(status) as server:
        hook = Webhook(address(server), 5.0, Path("run"))
        hook.send(Alert("spike", 1, "one"))
        hook.send(Alert("spike", 2, "two"))
        hook.close()
        assert len(server.received) == 2, "it is tried again"
    (record,) = caplog.records
    assert "127.0.0.1" in record.message
    assert said in record.message
    assert "secret" not in record.message


def test_an_address_that_never_answers_costs_its_seconds_and_no_memory(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hook = Webhook(f"http://127.0.0.1:{silent.getsockname()[1]}/", 0.2, Path("run"))
        began = time.monotonic()
        for step in range(300):
            hook.send(Alert("spike", step, "text"))
        assert time.monotonic() - began < 0.2, "a training does not wait"
        hook.close()
        assert time.monotonic() - began < 2.0
    assert len(caplog.records) == 1


def test_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    hook = Webhook(f"http://127.0.0.1:{port}/", 1.0, Path("run"))
    hook.send(Alert("spike", 1, "text"))
    hook.close()
    assert "Connection refused" in caplog.records[0].message


def test_a_stall_is_told_from_any_rank(tmp_path: Path) -> None:
    with receiver() as server:
        Monitor(MonitorConfig(webhook=address(server))).stalled(tmp_path, "rank 1 has not moved for 600 s")
        ((_, _, body),) = server.received
    assert (body["kind"], body["text"]) == ("stall", f"{tmp_path.name}: rank 1 has not moved for 600 s")
    (line,) = read_metrics(tmp_path / "metrics.jsonl", "alert")
    assert line["kind"] == "stall"
