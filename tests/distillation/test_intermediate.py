"""The losses between layers are what their formulas say, and only between layers that correspond."""

import pytest
import torch
import torch.nn.functional as F

from dualroute.distillation.intermediate import (
    Projections,
    Recorded,
    attention_sum,
    check_heads,
    hidden_sum,
    layer_pairs,
    recording,
    route_widths,
)
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig

PAIRS = [(0, 1), (2, 3)]


def test_layers_are_spread_evenly():
    assert layer_pairs(None, 2, 6) == [(0, 2), (1, 5)]
    assert layer_pairs(None, 3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert layer_pairs([1, -1, 0], 3, 2) == [(0, 1), (2, 0)]


def states(width, seed):
    draw = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(2, 5, width, generator=draw) for layer in range(4)}


def test_hidden_states_are_compared_after_the_projection():
    student, teacher = Recorded(outputs=states(6, 0)), Recorded(outputs=states(8, 1))
    projections = Projections(PAIRS, 6, 8, seed=0)
    rows = torch.tensor([0, 3, 9])
    mse, cosine = (hidden_sum(student, teacher, PAIRS, projections, rows, kind) for kind in ("mse", "cosine"))
    expected = torch.zeros(2)
    for ours, theirs in PAIRS:
        own = (student.outputs[ours] @ projections[str(ours)].weight.T).reshape(10, 8)[rows]
        aim = teacher.outputs[theirs].reshape(10, 8)[rows]
        for one, other in zip(own, aim, strict=True):
            expected += torch.stack([F.mse_loss(one, other), 1 - F.cosine_similarity(one, other, dim=0)]) / 2
    torch.testing.assert_close(torch.stack([mse, cosine]), expected)
    mse.backward()
    assert all(p.grad.abs().max() > 0 for p in projections.parameters())


def test_heads_are_compared_route_by_route():
    student, teacher = Recorded(heads=states(12, 0)), Recorded(heads=states(12, 1))
    rows = torch.tensor([1, 2])
    found = attention_sum(student, teacher, PAIRS, rows, [(8, 4), (12, 0)])
    expected = 0.0
    for (ours, theirs), routes in zip(PAIRS, (slice(0, 8), slice(8, 12)), strict=True):
        difference = (student.heads[ours] - teacher.heads[theirs]).reshape(10, 12)[rows].square()
        if ours == 0:
            expected += difference[:, routes].mean(1).sum() + difference[:, 8:].mean(1).sum()
        else:
            expected += difference.mean(1).sum()
    torch.testing.assert_close(found, expected / 2)


def test_what_passes_through_the_model_is_recorded_and_the_hooks_are_gone():
    config = ModelConfig(vocab_size=20, dim=16, num_layers=3, num_heads=4, window=4)
    model = DualRoutingTransformer(config)
    ids = torch.randint(20, (2, 7))
    with recording(model, [0, 2], heads=True) as seen:
        final = model.hidden_states(ids)
    assert sorted(seen.outputs) == sorted(seen.heads) == [0, 2]
    torch.testing.assert_close(model.norm(seen.outputs[2]), final)
    attention = model.layers[2].attention
    assert seen.heads[2].shape == (2, 7, 16)
    before = seen.outputs[0]
    model.hidden_states(ids + 0)
    assert seen.outputs[0] is before
    assert not attention.out_proj._forward_pre_hooks
    assert route_widths([(2, 2)], config) == [(8, 8)]


def test_heads_that_do_not_correspond_are_refused_with_both_numbers():
    student = ModelConfig(vocab_size=20, dim=16, num_layers=3, num_heads=4)
    check_heads(PAIRS, student, ModelConfig(vocab_size=20, dim=32, num_layers=4, num_heads=4, head_dim=4))
    dense = ModelConfig(vocab_size=20, dim=16, num_layers=4, num_heads=4, attention="dense")
    with pytest.raises(UserError, match="student has global_heads 2 and layer 1 of the teacher 4"):
        check_heads(PAIRS, student, dense)
