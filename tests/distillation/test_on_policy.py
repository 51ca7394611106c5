"""Texts that the student writes itself: which steps, which tokens, which labels."""

import pytest
import torch

from dualroute.distillation.on_policy import Prompts, document_beginnings, is_on_policy, own_continuations
from dualroute.model import DualRoutingTransformer, ModelConfig


def test_the_steps_of_own_text_are_a_function_of_the_seed():
    chosen = [step for step in range(2000) if is_on_policy(3, step, 0.25)]
    assert chosen == [step for step in range(2000) if is_on_policy(3, step, 0.25)]
    assert chosen != [step for step in range(2000) if is_on_policy(4, step, 0.25)]
    assert len(chosen) / 2000 == pytest.approx(0.25, abs=0.03)
    assert not any(is_on_policy(3, step, 0.0) for step in range(50))
    assert all(is_on_policy(3, step, 1.0) for step in range(50))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=12, dim=16, num_layers=2, num_heads=2, window=4, max_context=64)
    return DualRoutingTransformer(config)


def test_own_text_is_labelled_after_its_prefix_until_it_ends(small):
    ids = torch.randint(12, (4, 20), generator=torch.Generator().manual_seed(3))
    segments = torch.ones_like(ids)
    segments[0, 12:] = 2
    segments[1, 4:] = 2
    batch = {"input_ids": ids, "segment_ids": segments}
    batch |= Prompts(6)(batch)
    settings = {"new_tokens": 30, "temperature": 1.0, "eos_id": 2}
    own = own_continuations(small, batch, draw=(0, 1, 2), **settings)
    assert own["input_ids"].shape == (4, 35)
    assert torch.equal(
        own["input_ids"][:, :6], torch.stack([ids[0, :6], ids[1, 4:10], ids[2, :6], ids[3, :6]])
    )
    assert (own["labels"][:, :5] == -100).all()
    ended = 0
    for inputs, labels in zip(own["input_ids"], own["labels"], strict=True):
        drawn = inputs[6:].tolist()
        end = drawn.index(2) if 2 in drawn else len(drawn)
        assert labels[5 : 5 + end].tolist() == drawn[:end]
        if end < len(drawn):
            ended += 1
            assert labels[5 + end] == 2
            assert (labels[6 + end :] == -100).all()
    assert ended
    assert int(own["num_targets"]) == int((own["labels"] != -100).sum())
    again = own_continuations(small, batch, draw=(0, 1, 2), **settings)
    other = own_continuations(small, batch, draw=(0, 1, 3), **settings)
    assert torch.equal(own["labels"], again["labels"])
    assert not torch.equal(own["labels"], other["labels"])


def test_a_short_document_shortens_every_prefix():
    ids, segments = torch.arange(8).repeat(2, 1), torch.tensor([[1] * 8, [1, 1, 2, 2, 2, 0, 0, 0]])
    assert document_beginnings(ids, segments, 6).tolist() == [[0, 1, 2], [2, 3, 4]]
