"""Joined layers give what the single ones give, and own their weights together with them."""

import pytest
import torch
from torch import nn

from dualroute.compress.quantize import quantize_model
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.fused_linear import Joined, join
from dualroute.model.quantized import Quantization

SCHEMES = [
    None,
    Quantization("int8_weight_only"),
    Quantization("int8_dynamic"),
    Quantization("int4_weight_only", 32),
]


def pair(bias=False, scheme=None):
    """Two layers that read rows of 64."""
    torch.manual_seed(0)
    if scheme is None:
        return [nn.Linear(64, width, bias=bias) for width in (48, 96)]
    config = ModelConfig(vocab_size=128, dim=64, num_layers=1, num_heads=2, ffn_dim=64, qkv_bias=bias)
    model = DualRoutingTransformer(config)
    if bias:
        for route in (model.layers[0].attention.global_qkv, model.layers[0].attention.local_qkv):
            nn.init.normal_(route.bias)
    layer = quantize_model(model, scheme).layers[0]
    return [layer.attention.global_qkv, layer.attention.local_qkv]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.scheme if scheme else "float")
def test_joined_layers_give_what_each_gives(scheme):
    if scheme is not None:
        pytest.importorskip("torchao")
    layers, rows = pair(scheme=scheme), torch.randn(3, 64)
    expected = [layer(rows) for layer in layers]
    joined = Joined(layers)
    assert len(joined.layers) == 1
    for result, one in zip(joined(rows), expected, strict=True):
        torch.testing.assert_close(result, one, atol=1e-5, rtol=1e-5)


def test_biases_are_joined():
    layers, rows = pair(bias=True), torch.randn(3, 64)
    expected = torch.cat([layer(rows) for layer in layers], -1)
    torch.testing.assert_close(torch.cat(Joined(layers)(rows), -1), expected)
    torch.testing.assert_close(torch.cat([layer(rows) for layer in layers], -1), expected)


@pytest.mark.parametrize("scheme", SCHEMES[1:], ids=lambda scheme: scheme.scheme)
def test_biases_of_integers_are_joined(scheme):
    pytest.importorskip("torchao")
    layers, rows = pair(scheme=scheme, bias=True), torch.randn(3, 64)
    assert all(float(layer.bias.abs().min()) > 0 for layer in layers)
    expected = torch.cat([layer(rows) for layer in layers], -1)
    joined = Joined(layers)
    assert len(joined.layers) == 1
    torch.testing.assert_close(torch.cat(joined(rows), -1), expected, atol=1e-5, rtol=1e-5)


def test_nothing_is_stored_twice():
    layers = pair()
    before = [layer.weight.clone() for layer in layers]
    whole = join(layers)
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, weight)
        assert layer.weight.untyped_storage().data_ptr() == whole.weight.untyped_storage().data_ptr()


def test_what_cannot_be_joined_is_called_one_by_one():
    class Foreign(nn.Linear):
        pass

    layers, rows = [nn.Linear(64, 8), Foreign(64, 16)], torch.randn(3, 64)
    joined = Joined(layers)
    assert list(joined.layers) == layers
    assert [len(part[0]) for part in joined(rows)] == [8, 16]
    assert join(layers[:1]) is None
    assert join([nn.Linear(64, 8), nn.Linear(64, 8, bias=False)]) is None
