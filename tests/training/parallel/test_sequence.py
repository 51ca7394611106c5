"""Texts divided among ranks: exact values and gradients; what does not divide is refused."""

import pytest
import torch

from dualroute.attention import DualRouting
from dualroute.errors import UserError
from dualroute.model import ModelConfig
from dualroute.training.parallel.environment import World
from dualroute.training.parallel.sequence import check_sequence_parallel
from tests import warm
from tests.conftest import ROOT
from tests.training.step.test_module import environment


@pytest.mark.slow
def test_two_ranks_give_what_one_gives():
    warm.ranks(2, "tests/training/parallel/processes/sequence_ranks.py", [], cwd=ROOT, env=environment())


def test_ranks_and_heads_that_do_not_divide_are_named():
    model = ModelConfig(vocab_size=10, dim=64, num_heads=8, num_kv_heads=4)
    assert check_sequence_parallel(2, World(world_size=4), model) == 2
    with pytest.raises(UserError, match="does not divide the 3 rank"):
        check_sequence_parallel(2, World(world_size=3), model)
    with pytest.raises(UserError, match=r"model.global_heads is 4 with 2 query head"):
        check_sequence_parallel(4, World(world_size=4), model)
    with pytest.raises(UserError, match="at least 1"):
        check_sequence_parallel(0, World(), model)


def test_a_layer_refuses_a_group_that_its_heads_cannot_be_divided_among():
    class Three:
        def size(self):
            return 3

    layer = DualRouting(32, 4)
    layer.sequence_group = Three()
    with pytest.raises(ValueError, match="global_heads=2"):
        layer(torch.zeros(1, 8, 32))
