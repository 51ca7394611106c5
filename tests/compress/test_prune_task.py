"""A model of a task, and one that finds masked tokens, are cut by their own loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dualroute.cli import main
from dualroute.compress.calibration import calibrate
from dualroute.compress.config import PruneConfig
from dualroute.evaluate.load import load
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import find_checkpoint, save_model
from dualroute.tasks.answer import Answerer
from dualroute.tasks.evaluate import evaluate_task
from tests.tasks.made import MOODS, finetune, reviews, write_jsonl

SIZES = ("--ffn_dim", "32", "--global_heads", "1", "--multiple", "16", "--calibration_tokens", "2000")


@pytest.fixture(scope="module")
def moods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moods")
    rows = write_jsonl(folder / "rows.jsonl", reviews(300))
    assert finetune(rows, folder / "run", *MOODS, "--train.max_steps", "60") == 0
    return folder


@pytest.mark.slow
def test_a_classifier_is_cut_and_says_what_it_costs(
    moods: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "small"
    asked = [
        "prune",
        "--checkpoint",
        str(moods / "run"),
        "--output",
        str(output),
        *SIZES,
        "--batch_size",
        "2",
    ]
    assert main(asked) == 0
    assert "accuracy" in capsys.readouterr().out
    account = json.loads((output / "prune.json").read_text())
    assert account["parameters"]["pruned"] < account["parameters"]["parent"]
    told = account["task"]
    assert told["parent"]["accuracy"] > 0.9
    answerer = Answerer(output)  # the checkpoint is one of the task: it can be asked and evaluated
    assert evaluate_task(answerer, str(moods / "rows.jsonl"), 100).metrics["accuracy"] > 0.7
    mine = evaluate_task(Answerer(moods / "run"))
    assert (told["rows"], told["parent"]) == (mine.rows, mine.metrics)


@pytest.mark.slow
def test_calibration_is_on_rows_by_the_loss_of_the_training(moods: Path, tmp_path: Path) -> None:
    """Rows that are given, in whole examples; the loss is the cross-entropy of their labels."""
    rows = write_jsonl(tmp_path / "few.jsonl", reviews(20, seed=3))
    config = PruneConfig(str(moods / "run"), str(tmp_path / "x"), data=str(rows), ffn_dim=64, device="cpu")
    found = calibrate(config)
    assert found.answerer is not None
    total = 0.0
    kind, model = found.answerer.kind, found.loaded.model
    for row in reviews(20, seed=3):
        (example,) = kind.encode(row)
        outputs = model(torch.from_numpy(example.fields["input_ids"]).long()[None])[0]
        chosen = torch.from_numpy(example.fields["outputs"])
        labels = torch.from_numpy(example.fields["labels"]).long()
        total += torch.nn.functional.cross_entropy(outputs[chosen], labels[chosen]).item()
    assert found.loss(model, found.batches) == pytest.approx(total / 20, abs=1e-5)


def test_an_encoder_is_cut_by_its_masked_loss(tiny_dataset: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=320, dim=32, num_layers=2, num_heads=4, ffn_dim=64, block=16, sub_block=8, causal=False
    )
    said = {"context": 64, "settings": {"data": {"mask_share": 0.2}}}
    model = DualRoutingTransformer(config)
    save_model(model, tmp_path / "encoder", tiny_dataset / "tokenizer.model", said)
    where = ["--checkpoint", str(tmp_path / "encoder"), "--data", str(tiny_dataset)]
    assert main(["prune", *where, "--output", str(tmp_path / "small"), *SIZES]) == 0
    small = load(tmp_path / "small", "cpu").model.config
    assert (small.causal, small.ffn_dim, small.global_heads) == (False, 32, 1)
    (batch, *_) = calibrate(
        PruneConfig(str(tmp_path / "encoder"), str(tmp_path / "y"), str(tiny_dataset), ffn_dim=64)
    ).batches
    assert (batch["labels"] != -100).sum() == round(0.2 * 64) * len(batch["labels"])
    assert find_checkpoint(tmp_path / "small").metadata["context"] == 64
