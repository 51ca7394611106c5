"""A model that has learnt a little, and text to calibrate on."""

from pathlib import Path

import pytest
import torch

from dualroute.data.tokenizer import Tokenizer
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import save_model


@pytest.fixture(scope="session")
def trained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of weights, trained for a few steps on `tiny_dataset`."""
    from dualroute.data.module import ShardDataModule

    torch.manual_seed(0)
    tokenizer = Tokenizer(tiny_dataset / "tokenizer.model")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, dim=32, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=8,
        ffn_dim=64, max_context=128, window=32, block=16, top_k=2, global_mode="routed", gate=True,
    )  # fmt: skip
    model = DualRoutingTransformer(config)
    data = ShardDataModule(tiny_dataset, 64, 8, 512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _, batch in zip(range(60), data.train_dataloader(), strict=False):
        logits = model(batch["input_ids"], segment_ids=batch["segment_ids"], positions=batch["positions"])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    save_model(model, folder, tokenizer.path, {"context": 64})
    return folder
