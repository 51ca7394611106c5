"""The benchmark of shared choices sets them, and times what it says."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import save_model
from tests.benchmarks.scripts import load


@pytest.mark.slow
def test_a_row_for_each_number_of_layers(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=320, dim=32, num_layers=3, num_heads=4, block=8, sub_block=8, top_k=2, window=8,
        max_context=256, global_mode="routed",
    )  # fmt: skip
    model = DualRoutingTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    save_model(model, tmp_path / "model", tiny_dataset / "tokenizer.model", {"context": 64})
    script = load("models/shared_choice.py")
    words = [
        "shared_choice.py", "--checkpoint", tmp_path / "model", "--data", tiny_dataset, "--context", "96",
        "--max_tokens", "960", "--lengths", "128", "--repeats", "1", "--output", tmp_path,
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", list(map(str, words)))
    script.main()
    with (tmp_path / "shared_choice.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["layers to a choice"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["above"] == "+0.00 %"
    assert len({row["loss"] for row in rows}) == 3
    assert all(float(row[column]) > 0 for row in rows for column in ("us/token, 128", "us/step, 128"))
