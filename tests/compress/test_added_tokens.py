"""Tokens added beside a sentencepiece model become its own."""

import json

import pytest

from data_prep.train_tokenizer import train_tokenizer
from dualroute.compress.added_tokens import with_added_tokens
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_tokenizer(["some words of the river\n"] * 50, 275, "bpe", 0))
    return path


def says(path, **tokens):
    described = {
        str(number): {"content": piece, "special": special} for piece, (number, special) in tokens.items()
    }
    (path.parent / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": described}))


def test_special_and_other_tokens(path, tmp_path):
    before = Tokenizer(path)
    size = before.vocab_size
    assert with_added_tokens(path) is None
    says(path, known=(2, True))
    assert with_added_tokens(path) is None
    says(path, eos=(2, True), turn=(size, True), note=(size + 1, False))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "tokenizer.model").write_bytes(with_added_tokens(path))
    after = Tokenizer(tmp_path / "more" / "tokenizer.model")
    assert after.vocab_size == size + 2
    assert after.pieces()[size:] == ["turn", "note"]
    assert after.special_tokens["turn"].id == size
    assert after.encode("words note turn").count(size + 1) == 1
    assert size not in after.encode("words note turn")
    assert after.encode("some words\n") == before.encode("some words\n")
    assert after.decode(after.encode("a note turn")) == "a note turn"


def test_the_older_file_and_a_gap(path):
    size = Tokenizer(path).vocab_size
    (path.parent / "added_tokens.json").write_text(json.dumps({"<x>": size, "<y>": size + 1}))
    assert with_added_tokens(path) is not None
    (path.parent / "added_tokens.json").write_text(json.dumps({"<x>": size + 3}))
    with pytest.raises(UserError, match=r"without a gap: give a tokenizer\.json") as caught:
        with_added_tokens(path)
    assert "\n" not in str(caught.value)
