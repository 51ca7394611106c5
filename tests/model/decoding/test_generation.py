import pytest
import torch

from dualroute.model import DualRoutingTransformer, ModelConfig, SamplingConfig, generate
from dualroute.model.decoding.generation import continue_batch
from dualroute.model.decoding.sampler import draw, next_tokens


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=40, dim=32, num_layers=2, num_heads=4, max_context=64, window=8, block=16)
    return DualRoutingTransformer(config)


def greedy_without_cache(model, prompt, count):
    model.eval()
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_decoding_with_the_cache_equals_recomputing_everything(model):
    prompt = list(range(1, 20))
    sampling = SamplingConfig(max_new_tokens=15, temperature=0)
    with torch.no_grad():
        assert list(generate(model, prompt, sampling)) == greedy_without_cache(model, prompt, 15)


def test_the_same_seed_gives_the_same_text_and_leaves_the_global_generator_alone(model):
    before = torch.get_rng_state()
    first = list(generate(model, [1, 2], SamplingConfig(max_new_tokens=20, seed=3)))
    assert first == list(generate(model, [1, 2], SamplingConfig(max_new_tokens=20, seed=3)))
    assert first != list(generate(model, [1, 2], SamplingConfig(max_new_tokens=20, seed=4)))
    assert torch.equal(before, torch.get_rng_state())


def test_generation_ends_at_eos_and_at_the_context(model):
    eos = greedy_without_cache(model, [1, 2, 3], 1)[0]
    assert list(generate(model, [1, 2, 3], SamplingConfig(temperature=0), eos_id=eos)) == [eos]
    assert len(list(generate(model, [1] * 60, SamplingConfig(max_new_tokens=99)))) == 4


def test_training_mode_is_restored(model):
    model.train()
    list(generate(model, [1], SamplingConfig(max_new_tokens=2)))
    assert model.training


def distribution(logits, **sampling):
    """(V,) probabilities of what may come next."""
    ids, probabilities = next_tokens(logits, SamplingConfig(**({"top_p": 1, "temperature": 1} | sampling)))
    assert len(ids.unique()) == len(ids)
    return torch.zeros_like(logits).index_put((ids,), probabilities)


def test_top_k_and_top_p_keep_the_most_likely_tokens():
    logits = torch.tensor([1.0, 2.0, 0.0, -1.0])
    torch.testing.assert_close(distribution(logits), logits.softmax(-1))
    torch.testing.assert_close(distribution(logits, temperature=2), (logits / 2).softmax(-1))
    two = distribution(logits, top_k=2)
    torch.testing.assert_close(two[:2], logits[:2].softmax(-1))
    assert two[2:].sum() == 0
    # cumulative mass is .64, .88, .97: 0.7 is reached with the second token
    torch.testing.assert_close(distribution(logits, top_p=0.7), two)
    torch.testing.assert_close(distribution(logits, top_k=3, top_p=0.7), two)
    assert distribution(logits, temperature=0).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("top_p", [0.3, 0.95, 0.9999])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_sorting_all(top_p):
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    ordered, order = logits.double().softmax(-1).sort(descending=True)
    kept = order[ordered.cumsum(0) - ordered < top_p]
    expected = torch.zeros_like(logits)
    expected[kept] = logits[kept].softmax(-1)
    torch.testing.assert_close(distribution(logits, top_p=top_p), expected, rtol=1e-3, atol=1e-6)


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    logits = torch.tensor([1.0, 2.0, -1.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(logits, SamplingConfig(temperature=1, top_p=1), generator) for _ in range(4000)]
    found = torch.tensor(drawn).bincount(minlength=4) / 4000
    torch.testing.assert_close(found, logits.softmax(-1), rtol=0, atol=0.025)  # three standard deviations


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_sampling_values_out_of_range_are_named(values, named):
    with pytest.raises(ValueError, match=named):
        SamplingConfig(**values)


def test_prompts_that_leave_no_room_are_refused(model):
    with pytest.raises(ValueError, match="at most 64"):
        list(generate(model, [1] * 64, SamplingConfig()))
    with pytest.raises(ValueError, match="empty"):
        list(generate(model, [], SamplingConfig()))


def test_a_batch_is_continued_as_each_text_alone(model):
    prompts = torch.randint(40, (3, 5), generator=torch.Generator().manual_seed(1))
    texts = continue_batch(model.train(), prompts, 6, torch.Generator().manual_seed(2), temperature=1e-6)
    assert model.training
    assert torch.equal(texts[:, :5], prompts)
    for prompt, text in zip(prompts.tolist(), texts.tolist(), strict=True):  # nearly greedy
        with torch.no_grad():
            assert text[5:] == greedy_without_cache(model, prompt, 6)
    with pytest.raises(ValueError, match="do not fit"):
        continue_batch(model, prompts, 60, torch.Generator())


def test_a_batch_is_drawn_from_the_distribution_of_the_model(model):
    """Of many draws of one token, each comes as often as the model says."""
    prompts = torch.tensor([[3, 1, 2]]).repeat(4000, 1)
    texts = continue_batch(model, prompts, 1, torch.Generator().manual_seed(0), temperature=0.3)
    with torch.no_grad():
        expected = torch.softmax(model.eval()(prompts[:1])[0, -1] / 0.3, -1)
    found = torch.bincount(texts[:, -1], minlength=40) / 4000
    assert (found - expected).abs().max() < 0.03
    assert 0.1 < expected.max() < 0.9
