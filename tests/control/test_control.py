"""Stops, words and grammars: what an untrained model may write with them."""

import json
import re
import sys

import pytest

from dualroute.control import TextStream, new_sampler
from dualroute.control.grammar import Grammar, GrammarConstraint
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.model import SamplingConfig, generate
from tests.conftest import smallest_model

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kinds": {"type": "array", "items": {"enum": ["bird", "stone"]}, "maxItems": 2},
    },
    "required": ["name", "age", "kinds"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tiny_dataset):
    return Tokenizer(tiny_dataset / "tokenizer.model")


@pytest.fixture(scope="module")
def model(tokenizer):
    return smallest_model(tokenizer.vocab_size, 512)


def write(model, tokenizer, **options):
    """(text, tokens) of a prompt's continuation."""
    sampling = SamplingConfig(**({"temperature": 1.5, "top_p": 1.0, "max_new_tokens": 40} | options))
    prompt = tokenizer.encode("the old", bos=True)
    sampler = new_sampler(sampling, tokenizer, prompt)
    stream, tokens = TextStream(tokenizer, prompt, sampling.stop), []
    for token in generate(model, prompt, sampling, tokenizer.eos_ids, sampler=sampler):
        tokens.append(token)
        stream.add(token)
        if stream.stopped:
            break
    stream.finish()
    return stream.text, tokens


@pytest.mark.parametrize("seed", range(5))
def test_a_schema_is_met_by_an_untrained_model(model, tokenizer, tmp_path, seed):
    pytest.importorskip("llguidance", reason="the extra control is not installed")
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    text, _ = write(model, tokenizer, json_schema=str(path), max_new_tokens=300, seed=seed)
    found = json.loads(text)
    assert list(found) == ["name", "age", "kinds"]
    assert len(found["name"]) <= 6
    assert 0 <= found["age"] <= 150
    assert set(found["kinds"]) <= {"bird", "stone"}


def test_expressions_and_grammars_are_met(model, tokenizer, tmp_path):
    pytest.importorskip("llguidance", reason="the extra control is not installed")
    for seed in range(3):
        text, _ = write(model, tokenizer, regex="[ab]{3}-[0-9]{2,4}é?", seed=seed)
        assert re.fullmatch("[ab]{3}-[0-9]{2,4}é?", text)
    grammar = tmp_path / "sums.lark"
    grammar.write_text('start: NUMBER ("+" NUMBER){2}\nNUMBER: /[0-9]{1,2}/\n')
    text, tokens = write(model, tokenizer, grammar=str(grammar))
    assert re.fullmatch(r"\d{1,2}\+\d{1,2}\+\d{1,2}", text)
    assert len(tokens) < 40  # nothing follows what is complete
    grammar.write_text("start: (")
    with pytest.raises(UserError, match=r"sampling.grammar .*sums.lark cannot be used"):
        write(model, tokenizer, grammar=str(grammar))
    with pytest.raises(UserError, match="is not JSON"):
        write(model, tokenizer, json_schema=str(grammar))
    with pytest.raises(UserError, match="contradict each other"):
        write(model, tokenizer, regex="b+", banned=["b"])
    constraint = GrammarConstraint(tokenizer, Grammar.of_schema({"enum": [1]}))
    assert not constraint.is_finished


def test_a_missing_library_names_its_extra(model, tokenizer, monkeypatch):
    from dualroute.control.vocabulary import vocabulary_of

    vocabulary_of.cache_clear()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[control\]'"):
        write(model, tokenizer, regex="a")


def test_banned_texts_are_not_written_however_tokens_spell_them(model, tokenizer):
    free = "".join(write(model, tokenizer, seed=seed, max_new_tokens=200)[0] for seed in range(4))
    banned = ["th", "r", "é", " o"]  # across tokens, inside of them, bytes of a character
    assert any(one in free for one in banned)
    for seed in range(4):
        text, _ = write(model, tokenizer, seed=seed, max_new_tokens=200, banned=banned)
        assert not [one for one in banned if one in text]
        assert len(text) > 20


def test_required_texts_are_written_before_the_end(model, tokenizer):
    words = ["river", "中文", "old bird"]
    for seed in range(4):
        text, tokens = write(model, tokenizer, seed=seed, required=words, stop=["a"], max_new_tokens=60)
        assert [word for word in words if word not in text] == []
        assert len(tokens) <= 60
    text, tokens = write(model, tokenizer, required=["stone"], temperature=0, max_new_tokens=6)
    assert "stone" in text


def test_a_text_ends_in_front_of_its_stop(tokenizer):
    pieces = []
    stream = TextStream(tokenizer, tokenizer.encode("a"), ["stone", "tone!", "zz"])
    for token in tokenizer.encode("é🙂 the sto ston stone and more"):
        pieces.append(stream.add(token))
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == "é🙂 the sto ston "
    assert stream.stopped == "stone"
    held = TextStream(tokenizer, stops=["stone"])
    shown = "".join(held.add(token) for token in tokenizer.encode("a sto"))
    assert not shown.endswith("s")
    assert shown + held.finish() == "a sto"


def test_tokens_spell_the_bytes_of_a_text(tokenizer):
    spelled = tokenizer.token_bytes()
    text = "the old bird\n  é中🙂\u2581x"
    assert b"".join(spelled[number] for number in tokenizer.encode(text)) == text.encode()
    assert spelled[tokenizer.eos_id] == b""


def test_the_end_gives_out_what_was_held_back(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("a\N{GRINNING FACE}")
    for stops in ([], ["never"]):
        stream = TextStream(tokenizer, stops=stops)
        pieces = [stream.add(token) for token in whole[:-1]]  # its last byte is missing
        assert pieces[-1] == ""
        pieces.append(stream.finish())
        assert "".join(pieces) == tokenizer.decode(whole[:-1]) == stream.text
        assert stream.finish() == ""
