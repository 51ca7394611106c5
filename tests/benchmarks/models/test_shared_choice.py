"""The benchmark of shared choices: the first layer of a group chooses, and the others obey."""

from __future__ import annotations

import pytest
import torch

from dualroute.model import DualRoutingTransformer, ModelConfig
from tests.benchmarks.scripts import load


@pytest.fixture
def model() -> DualRoutingTransformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=64, dim=32, num_layers=3, num_heads=4, block=8, sub_block=8, top_k=2, global_mode="routed"
    )
    return DualRoutingTransformer(config).eval()


@torch.no_grad()
def test_a_group_of_layers_reads_what_its_first_has_chosen(model: DualRoutingTransformer) -> None:
    one_choice_for = load("models/shared_choice.py").one_choice_for
    ids = torch.randint(64, (1, 128), generator=torch.Generator().manual_seed(1))
    alone = model(ids)
    with one_choice_for(1, of=3) as agreed:
        assert torch.equal(model(ids), alone)
    assert agreed == []
    with one_choice_for(2, of=3) as agreed:
        shared = model(ids)
        assert torch.equal(model(ids), shared)  # the second pass begins anew
    assert not torch.equal(shared, alone)
    assert len(agreed) == 2  # the second layer of each pass; the third chooses for itself
    assert 0 < agreed[0] < 1
    for layer in model.layers:  # all scores alike: every layer takes the first blocks
        layer.attention.global_qkv.weight.zero_()  # type: ignore[union-attr, operator]
    with one_choice_for(3, of=3) as agreed:
        model(ids)
    assert agreed == [1.0, 1.0]
