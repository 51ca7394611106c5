"""Objects behind tensors live as long as the tensors' memory, and are found by nothing else."""

import gc
import pickle
import weakref

import pytest
import torch

from dualroute.attention import Layout
from dualroute.attention.core.held import held, hold
from dualroute.attention.core.rope import Rope


class Thing:
    pass


def test_what_is_held_lives_as_long_as_a_tensor_shares_its_memory():
    thing = Thing()
    alive = weakref.ref(thing)
    tensor = hold(thing)
    del thing
    assert held(tensor) is alive()
    view = tensor.detach()
    del tensor
    assert held(view) is alive()
    del view
    assert alive() is None  # at once, without the collector


def test_a_graph_that_saved_the_tensor_holds_the_object():
    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, tensor):
            ctx.save_for_backward(tensor)
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            assert isinstance(held(ctx.saved_tensors[0]), Thing)
            return grad, None

    thing = Thing()
    alive = weakref.ref(thing)
    x = torch.ones(1, requires_grad=True)
    out = Save.apply(x, hold(thing))
    del thing
    gc.collect()
    assert alive() is not None
    out.backward()
    del out
    assert alive() is None


def test_a_copy_of_the_number_is_refused():
    copy = hold(Thing()).clone()
    with pytest.raises(ValueError, match="is a copy of one that stood for an object"):
        held(copy)


def test_a_layout_that_was_pickled_stands_for_its_own_stream():
    layout = Layout.build(2, 20, 8)
    layout.rotary_table(None, Rope(8, 8), torch.float32)
    other = pickle.loads(pickle.dumps(layout))
    assert held(layout.handle) is layout.stream
    assert held(other.handle) is other.stream
    assert other.stream is not layout.stream
    assert other.stream.buckets == layout.stream.buckets
