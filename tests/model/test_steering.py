"""Scaling a head is multiplying its output before the output projection."""

import pytest
import torch

from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.decoding.compiled_decode import CompiledDecoder
from dualroute.model.steering import attentions, parse_scales, steer


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=40, dim=32, num_layers=2, num_heads=8, num_kv_heads=4, global_heads=2, local_heads=6,
        max_context=128, window=8, block=16, top_k=1, global_mode="routed", gate=True,
    )  # fmt: skip
    return DualRoutingTransformer(config).eval().double()


TOKENS = torch.randint(40, (2, 90), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_it_is_exactly_the_head_times_the_factor(model):
    """Columns of the output projection times the factor: the same function, by the weights."""
    before = model(TOKENS)
    steer(model, "global.1.1=0.5, local.*.4=0, local.0=2, local.0.5=1")
    steered = model(TOKENS)
    assert (steered - before).abs().max() > 1e-3
    expected = {0: [1, 1, 2, 2, 2, 2, 2, 1], 1: [1, 0.5, 1, 1, 1, 1, 0, 1]}
    steer(model, "")
    torch.testing.assert_close(model(TOKENS), before, rtol=0, atol=0)
    for number, layer in enumerate(attentions(model)):
        factors = torch.tensor(expected[number], dtype=torch.float64).repeat_interleave(layer.head_dim)
        layer.out_proj.weight.mul_(factors)
    torch.testing.assert_close(model(TOKENS), steered, rtol=0, atol=1e-13)


@torch.no_grad()
def test_token_by_token_and_in_one_program_it_is_the_same(model):
    steer(model, "global=0,local.1.3=-1")
    whole = model(TOKENS)[:, -1]
    for decoder in (None, CompiledDecoder(model, compile=False)):
        caches = model.new_caches(2, 90)
        model.hidden_states(TOKENS[:, :-1], caches=caches)
        if decoder is None:
            last = model.head(model.hidden_states(TOKENS[:, -1:], caches=caches)[:, -1])
        else:
            last = decoder(TOKENS[:, -1:], caches)
        torch.testing.assert_close(last, whole, rtol=0, atol=1e-10)
    assert not [name for name in model.state_dict() if "scale" in name]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("global.3.2", "is no rule"),
        ("far.1=0", "no route 'far'"),
        ("global.1=x", "'x' is no factor"),
        ("global.1=nan", "no factor"),
        ("global.2=0", "layers 0 to 1"),
        ("global.0.2=0", "heads 0 to 1"),
    ],
)
def test_rules_that_name_nothing_are_refused(model, text, said):
    with pytest.raises(UserError, match=said):
        steer(model, text)


def test_a_route_that_is_not_there_is_named(model):
    config = ModelConfig(vocab_size=40, dim=32, num_layers=1, num_heads=4, attention="dense")
    with pytest.raises(UserError, match="of the local route there are none"):
        steer(DualRoutingTransformer(config), "local.0=0")
    assert [str(rule) for rule in parse_scales("global.*.2=0,local=0.5")] == ["global.*.2=0", "local.*=0.5"]
