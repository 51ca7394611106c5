"""Each option of the sampler against its formula, literally."""

import math

import pytest
import torch

from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig, Sampler, SamplingConfig, generate
from dualroute.model.decoding.compiled_decode import CompiledDecoder
from dualroute.model.decoding.generation import generate_batch
from dualroute.model.decoding.sampler import next_tokens

LOGITS = [1.5, -0.5, 2.0, 0.25, -3.0]


def literal(logits, sampling, prompt, written):
    """{token: probability} in the order of Hugging Face's ``generate``, in Python's own numbers."""
    values = list(logits)
    for token in range(len(values)):
        if token in set(prompt) | set(written):
            penalty = sampling.repetition_penalty
            values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
        count = written.count(token)
        values[token] -= sampling.presence_penalty * (count > 0) + sampling.frequency_penalty * count
    order = sorted(range(len(values)), key=lambda token: -values[token])
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = {token: math.exp(values[token] / sampling.temperature) for token in order}
    whole = sum(weights.values())
    kept, mass = [], 0.0
    for token in order:
        if mass < sampling.top_p:
            kept.append(token)
        mass += weights[token] / whole
    most = max(weights[token] for token in kept)
    kept = [token for token in kept if weights[token] >= sampling.min_p * most]
    whole = sum(weights[token] for token in kept)
    return {token: weights[token] / whole for token in kept}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
        {"presence_penalty": 0.9},
        {"frequency_penalty": 0.6},
        {"frequency_penalty": -0.6, "presence_penalty": -0.1},
        {
            "temperature": 1.3, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2,
            "presence_penalty": 0.3, "frequency_penalty": 0.4,
        },
    ],
)  # fmt: skip
def test_each_option_is_its_formula(options):
    sampling = SamplingConfig(**({"temperature": 1.0, "top_p": 1.0} | options))
    prompt, logits = [4, 2], torch.tensor(LOGITS)
    sampler = Sampler(sampling, prompt)
    for _ in range(4):
        expected = literal(LOGITS, sampling, prompt, sampler.written)
        ids, probabilities = next_tokens(sampler.adjusted(logits), sampling)
        found = dict(zip(ids.tolist(), probabilities.tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-5)
        assert sampler.draw(logits) in expected


@pytest.mark.parametrize("option", ["top_p", "temperature"])
def test_numbers_too_small_for_float32_leave_the_likeliest_token(option: str) -> None:
    sampling = SamplingConfig(**{"temperature": 1.0, "top_p": 1.0, option: 1e-60})
    likeliest = max(range(len(LOGITS)), key=LOGITS.__getitem__)
    assert Sampler(sampling).draw(torch.tensor(LOGITS)) == likeliest


def test_greedy_drawing_heeds_penalties():
    sampler = Sampler(SamplingConfig(temperature=0, presence_penalty=1), [])
    assert [sampler.draw(torch.tensor(LOGITS)) for _ in range(3)] == [2, 0, 2]


def test_log_probabilities_are_those_of_the_model_alone():
    sampler = Sampler(SamplingConfig(temperature=0.3, top_k=1, repetition_penalty=2, logprobs=2), [2])
    assert sampler.draw(torch.tensor(LOGITS)) == 0  # 2.0 / 2 < 1.5
    whole = math.log(sum(map(math.exp, LOGITS)))
    (found,) = sampler.logprobs
    assert found.token == 0
    assert found.logprob == pytest.approx(LOGITS[0] - whole, rel=1e-5)
    assert [token for token, _ in found.top] == [2, 0]
    assert found.top[0][1] == pytest.approx(LOGITS[2] - whole, rel=1e-5)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=40, dim=32, num_layers=2, num_heads=4, max_context=64, window=8, block=16)
    return DualRoutingTransformer(config).eval()


def test_texts_are_the_same_in_batches_of_any_size_alone_and_compiled(model):
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8], [1, 2, 3], [9] * 30]
    how = [SamplingConfig(12, seed=seed, temperature=1.2, frequency_penalty=0.5) for seed in range(5)]
    alone = [list(generate(model, prompt, one, eos_id=11)) for prompt, one in zip(prompts, how, strict=True)]
    assert alone[0] != alone[3]
    assert {len(text) for text in alone} != {12}  # some end early
    decoder = CompiledDecoder(model, compile=False)
    for size, given in ((2, None), (5, None), (5, decoder)):
        together = [[] for _ in prompts]
        for first in range(0, 5, size):
            samplers = [Sampler(one, of) for one, of in zip(how, prompts, strict=True)][first : first + size]
            for row, token in generate_batch(model, prompts[first : first + size], samplers, 11, given):
                together[first + row].append(token)
        assert together == alone


def test_what_reads_texts_is_refused_without_a_tokenizer(model):
    with pytest.raises(ValueError, match="need the tokenizer"):
        next(generate(model, [1], SamplingConfig(stop=["a"])))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"min_p": 1.5}, "sampling.min_p is 1.5"),
        ({"repetition_penalty": 0}, "sampling.repetition_penalty is 0"),
        ({"stop": ["a", ""]}, "sampling.stop holds an empty text"),
        ({"regex": "a", "json_schema": "s.json"}, "json_schema and sampling.regex cannot both hold"),
        ({"regex": "a", "required": ["b"]}, "required does not go with sampling.regex"),
        ({"banned": ["at"], "required": ["cat"]}, "'at', which is part of 'cat'"),
        ({"logprobs": 101}, "sampling.logprobs is 101"),
    ],
)
def test_options_that_cannot_be_are_named(values, said):
    with pytest.raises(UserError, match=said):
        SamplingConfig(**values)
