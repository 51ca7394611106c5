"""`generate` in the ways that other software calls it."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from dualroute.attention.backend import plain_torch  # noqa: E402
from tests.export.hf.models import GREEDY, greedy_of, ids_of, left_padded, wrapped  # noqa: E402

transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def plain_kernels():
    with plain_torch():
        yield


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_from_embeddings_as_from_ids(use_cache, num_beams):
    _, model = wrapped()
    rows = [ids_of(length, seed=length)[0].tolist() for length in (40, 11)]
    ids, mask = left_padded(rows)
    options = {"attention_mask": mask, "max_new_tokens": 12, "num_beams": num_beams, "use_cache": use_cache}
    texts = model.generate(input_ids=ids, **options, **GREEDY)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **options, **GREEDY), texts[:, 40:])
    both = model.generate(input_ids=ids, inputs_embeds=embeddings, **options, **GREEDY)
    assert torch.equal(both, texts)


def test_turns_of_a_conversation():
    """A cache that `generate` returns goes on with the next turn, longer than was asked for at first."""
    ours, model = wrapped()
    rows = [ids_of(length, seed=length)[0].tolist() for length in (30, 12)]
    ids, mask = left_padded(rows)
    cache = None
    for turn in range(3):
        out = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=10,
            return_dict_in_generate=True, **GREEDY,
        )  # fmt: skip
        cache = out.past_key_values
        rows = [row + greedy_of(ours, row, 10) for row in rows]
        assert [text[-10:].tolist() for text in out.sequences] == [row[-10:] for row in rows]
        more = ids_of(5, batch=2, seed=turn)
        rows = [row + new for row, new in zip(rows, more.tolist(), strict=True)]
        ids = torch.cat([out.sequences, more], 1)  # the padding stays where the cache saw it
        mask = torch.cat([mask, torch.ones(2, 15, dtype=torch.long)], 1)


def test_a_call_that_asked_for_no_cache_returns_one_to_go_on_from():
    ours, model = wrapped()
    ids = ids_of(50, batch=2)
    with torch.no_grad():
        out = model(input_ids=ids)
    texts = model.generate(
        input_ids=torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1), past_key_values=out.past_key_values,
        max_new_tokens=9, **GREEDY,
    )  # fmt: skip
    for text in texts:
        assert text[50:].tolist() == greedy_of(ours, text[:50].tolist(), 10)


def test_a_cache_may_be_copied_and_continued_twice():
    import copy

    ours, model = wrapped()
    prefix = ids_of(33)
    with torch.no_grad():
        cache = model(input_ids=prefix).past_key_values
    for seed in (1, 2):
        ids = torch.cat([prefix, ids_of(6, seed=seed)], 1)
        out = model.generate(input_ids=ids, past_key_values=copy.deepcopy(cache), max_new_tokens=8, **GREEDY)
        assert out[0, 39:].tolist() == greedy_of(ours, ids[0].tolist(), 8)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_what_is_returned_beside_the_texts(num_beams):
    _, model = wrapped()
    ids, mask = left_padded([ids_of(20)[0].tolist(), ids_of(9)[0].tolist()])
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=6, num_beams=num_beams, output_scores=True,
        output_logits=True, output_hidden_states=True, return_dict_in_generate=True, **GREEDY,
    )  # fmt: skip
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == 6
    rows = 2 * num_beams
    assert [tuple(state.shape) for state in out.hidden_states[0]] == [(rows, 20, 32)] * 3
    assert [tuple(state.shape) for state in out.hidden_states[-1]] == [(rows, 1, 32)] * 3
    if num_beams == 1:
        transition = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
        assert transition.shape == (2, 6)
        assert out.past_key_values.get_seq_length() == 25


def test_without_a_prompt_it_begins_with_bos():
    ours, model = wrapped()
    assert model.generate(max_new_tokens=5, **GREEDY)[0].tolist() == [1, *greedy_of(ours, [1], 5)]


def test_a_prompt_of_padding_alone_is_refused():
    _, model = wrapped()
    with pytest.raises(ValueError, match="a row has no token at all"):
        model.generate(input_ids=ids_of(3, batch=2), attention_mask=torch.tensor([[0] * 3, [1] * 3]))


def test_prompts_in_chunks():
    ours, model = wrapped()
    rows = [ids_of(length, seed=length)[0].tolist() for length in (40, 3)]
    ids, mask = left_padded(rows)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, prefill_chunk_size=16, **GREEDY
    )
    assert [text[40:].tolist() for text in out] == [greedy_of(ours, row, 5) for row in rows]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
        {"bad_words_ids": [[5], [7, 8]], "suppress_tokens": [9]},
        {"do_sample": True, "top_k": 5, "temperature": 0.7, "num_beams": 2},
        {"do_sample": True, "min_p": 0.05, "typical_p": 0.9},
        {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[1, 5, 6]])},
    ],
)
def test_options_of_generate_with_a_cache_as_without(options):
    _, model = wrapped()
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        texts.append(
            model.generate(
                input_ids=ids_of(30), max_new_tokens=10, use_cache=use_cache, **{**GREEDY, **options}
            )
        )
    assert torch.equal(*texts)


def test_assisted_decoding_is_refused_in_a_line():
    _, model = wrapped()
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": wrapped(num_layers=1)[1]}):
        with pytest.raises(ValueError, match="assisted decoding"):
            model.generate(input_ids=ids_of(20), max_new_tokens=8, **options, **GREEDY)


@torch.no_grad()
def test_logits_to_keep_are_those_of_all():
    _, model = wrapped()
    ids = ids_of(20, batch=2)
    logits = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, logits_to_keep=3).logits, logits[:, -3:])
    assert torch.equal(model(input_ids=ids, logits_to_keep=torch.tensor([2, 9])).logits, logits[:, [2, 9]])


@torch.no_grad()
def test_a_padded_text_has_the_logits_of_itself_wherever_the_padding_is():
    _, model = wrapped()
    text = ids_of(33)
    alone = model(input_ids=text).logits
    for before, after in ((9, 0), (0, 9), (4, 7)):
        ids = torch.nn.functional.pad(text, (before, after))
        mask = torch.nn.functional.pad(torch.ones_like(text), (before, after))
        for use_cache in (True, False, None):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=use_cache).logits
            torch.testing.assert_close(logits[:, before : before + 33], alone, rtol=0, atol=1e-5)


def test_a_quantised_cache_in_a_beam_search():
    """Every beam's rows follow it, the newest block's floats too: each beam's score is that of its text."""
    _, model = wrapped()
    ids = ids_of(40, batch=2)
    out = model.generate(
        input_ids=ids, past_key_values=model.model.new_cache(60, cache_dtype="int8"), max_new_tokens=12,
        num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True, **GREEDY,
    )  # fmt: skip
    kept = [cache.global_cache for group in out.past_key_values.groups for cache in group.caches]
    assert {part.bits for part in kept if part is not None} == {8}
    with torch.no_grad():
        logits = model(input_ids=out.sequences, use_cache=False).logits[:, 39:-1].log_softmax(-1)
    scores = logits.gather(2, out.sequences[:, 40:, None])[..., 0].mean(1)
    torch.testing.assert_close(out.sequences_scores, scores, rtol=0, atol=2e-2)
