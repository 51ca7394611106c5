"""Under ZeRO-3 no rank ever holds the model, and every rank holds its part of the same weights."""

import hashlib
import json

import pytest
import torch

from dualroute.model.checkpoint_format import find_checkpoint
from dualroute.model.config import ModelConfig
from dualroute.model.transformer import DualRoutingTransformer
from tests import warm
from tests.conftest import ROOT
from tests.training.step.test_module import SMALL, environment

pytest.importorskip("deepspeed")

SCRIPT = str(ROOT / "tests/training/parallel/sharded_ranks.py")
ZERO3 = ("--parallel.strategy", "deepspeed", "--parallel.zero_stage", "3", "--optim.lr", "0.003")
WIDE = (
    *("--model.dim", "512", "--model.num_layers", "12", "--train.micro_batch", "1", "--data.context", "32"),
    *("--train.tokens_per_batch", "128", "--optim.warmup_steps", "1"),
)


def sharded(ranks, dataset, folder, *more, steps="2"):
    """What each rank says of a run in ``folder``/run."""
    words = ["--data.path", dataset, "--output", folder / "run", "--train.max_steps", steps]
    warm.ranks(
        ranks,
        SCRIPT,
        [folder, "pretrain", *SMALL, *words, *ZERO3, *more],
        cwd=ROOT,
        env=environment(),
    )
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def digests(model):
    return {n: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for n, p in model.named_parameters()}


def seeded(run):
    """The model that one process builds for a run."""
    config = ModelConfig.from_file(find_checkpoint(run).folder / "model.json")
    torch.manual_seed(0)
    return DualRoutingTransformer(config)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_no_rank_ever_holds_the_model(ranks, tiny_dataset, tmp_path):
    said = sharded(ranks, tiny_dataset, tmp_path, *WIDE)
    model = seeded(tmp_path / "run")
    size = 4 * model.num_parameters()
    layer = 4 * sum(p.numel() for p in model.layers[0].parameters())
    print(size, layer, [(s["peak"] - s["before"], s["later"] - s["before"]) for s in said])
    for of_rank in said:
        assert of_rank["digests"] == digests(model)
        assert of_rank["peak"] - of_rank["before"] <= size / ranks + layer
