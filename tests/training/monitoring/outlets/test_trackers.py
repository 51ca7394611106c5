"""Weights & Biases without a network, MLflow in a folder, and services that are away."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from dualroute.errors import UserError
from dualroute.training.monitoring.config import MonitorConfig
from dualroute.training.monitoring.outlets.trackers import Trackers, check_trackers

SETTINGS = "model: {dim: 64}\nseed: 3\n"


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(MonitorConfig())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"monitor\.wandb needs .*pip install -e '\.\[wandb\]'"):
        check_trackers(MonitorConfig(wandb="project"))


@pytest.mark.slow
def test_mlflow_has_the_curves_and_the_settings_also_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    config = MonitorConfig(mlflow=f"file://{tmp_path}/mlruns")
    run = tmp_path / "first"
    run.mkdir()
    for steps in ((1, 2), (3,)):
        trackers = Trackers(config, run, SETTINGS)
        for step in steps:
            trackers.log(step, {"train/loss": 10.0 - step})
        trackers.close(well=True)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(config.mlflow)
    experiment = client.get_experiment_by_name("dualroute")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 9.0), (2, 8.0), (3, 7.0)]
    assert found.data.params["model/dim"] == "64"
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")


@pytest.mark.slow
def test_wandb_writes_into_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trackers = Trackers(MonitorConfig(wandb="project"), tmp_path, SETTINGS)
    trackers.log(1, {"train/loss": 9.0})
    trackers.close(well=True)
    (stored,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60  # a process of wandb's own writes it, which waits for the disk by itself
    while b"train/loss" not in stored.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"train/loss" in stored.read_bytes()


def test_a_service_that_fails_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Away:
        asked = 0

        def log_hyperparams(self, table: dict) -> None:
            pass

        def log_metrics(self, values: dict, step: int) -> None:
            Away.asked += 1
            raise ConnectionError("no route\nto host")

    module = sys.modules["dualroute.training.monitoring.outlets.trackers"]
    monkeypatch.setattr(module, "_mlflow", lambda address, run: Away())
    trackers = Trackers(MonitorConfig(mlflow="http://nowhere"), tmp_path, SETTINGS)
    trackers.log(1, {"train/loss": 9.0})
    trackers.log(2, {"train/loss": 9.0})
    trackers.close(well=False)
    assert Away.asked == 1
    (record,) = caplog.records
    assert record.message == ("monitor.mlflow fails (no route; to host): the training goes on without it")
