"""Seeded weights one parameter at a time are those of the model that is built at once."""

import pytest
import torch

from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.deferred_init import build_deferred

SHAPE = {"vocab_size": 37, "dim": 24, "num_layers": 3, "num_heads": 4, "max_context": 64}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tie_embeddings": False, "gate": True, "qk_norm": True, "qkv_bias": True},
        {"tie_embeddings": True, "attention": "dense"},
        {"attention": "interleaved", "dense_every": 2, "num_kv_heads": 2},
    ],
)
def test_deferred_weights_are_those_of_the_whole_model(more):
    config = ModelConfig(**SHAPE, **more)
    torch.manual_seed(5)
    whole = dict(DualRoutingTransformer(config).named_parameters())
    follows = torch.rand(1)
    model, draws = build_deferred(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.manual_seed(5)
    given = dict(draws.tensors())
    assert torch.equal(torch.rand(1), follows)  # nothing was drawn too much
    assert list(given) == draws.order
    assert given.keys() == whole.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(given[name], whole[name]) for name in whole)
    assert model.num_parameters() == sum(value.numel() for value in whole.values())


def test_a_parameter_that_nothing_fills_is_named(monkeypatch):
    class Bare(DualRoutingTransformer):
        def __init__(self, config):
            super().__init__(config)
            self.bare = torch.nn.Parameter(torch.empty(3))

    monkeypatch.setattr("dualroute.model.deferred_init.DualRoutingTransformer", Bare)
    with pytest.raises(RuntimeError, match="bare is never filled"):
        build_deferred(ModelConfig(**SHAPE))
