"""The card of a model tells its whole training, that of its parent and teacher included."""

from dualroute.evaluate.load import load
from dualroute.export.config import ExportConfig
from dualroute.export.model_card import card
from dualroute.model.checkpoint.format import save_model
from tests.export.conftest import tiny_model

GRANDPARENT = {
    "operation": "pretrain",
    "folder": "books/step-00000400",
    "step": 400,
    "tokens": 1000,
    "data_fingerprint": "a" * 64,
    "context": 512,
    "val_loss": 4.25,
}
METADATA = {
    "operation": "finetune",
    "step": 30,
    "tokens": 200,
    "context": 64,
    "val_loss": 2.5,
    "seed": 7,
    "teacher": {"folder": "large", "tokens": 9000},
    "lineage": [GRANDPARENT, {"operation": "prune", "folder": "small"}],
    "settings": {"optim": {"lr": 0.0005}, "train": {"tokens_per_batch": 4096, "precision": "bf16-mixed"}},
}


def test_trainings_parent_and_teacher(tiny_dataset, tmp_path):
    folder = tmp_path / "tuned"
    save_model(tiny_model(), folder, tiny_dataset / "tokenizer.model", METADATA)
    loaded = load(folder, "cpu")
    figures = {"class": "DualRoutingForCausalLM", "parity": {"logits": {"5": 0.0}, "texts": 3}}
    text = card(ExportConfig(str(folder), "hf", "out"), loaded, folder, {}, figures)
    assert "| trained on | 1,200 tokens in all (see History) |" in text
    lines = [
        "1. pretrain: books/step-00000400 (1,000 tokens in 400 steps; data aaaaaaaaaaaa; context 512; "
        "validation loss 4.2500)",
        "2. prune: small",
        "3. finetune: tuned (200 tokens in 30 steps; context 64; validation loss 2.5000; "
        "teacher large, 9,000 tokens)",
    ]
    assert "\n".join(lines) in text
    for row in ("learning rate | 0.0005", "tokens per batch | 4096", "precision | bf16-mixed", "seed | 7"):
        assert f"| {row} |" in text
    assert "They end at `<eos>`." in text
    assert str(tmp_path) not in text
