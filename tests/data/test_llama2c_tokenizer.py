"""The tokenizer of llama2.c, as a sentencepiece model."""

import struct
from itertools import pairwise

import pytest

from dualroute.data.llama2c_tokenizer import sentencepiece_model
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError

STORY = "Once upon a time, there was a little girl named Lily.\nShe  said: “Ω, 12 cats!”\n"


def literal_encode(path, text):
    """encode() of llama2.c's run.c: characters or bytes, then the best merge until there is none."""
    data, offset, pieces = path.read_bytes(), 4, []
    while offset < len(data):
        score, length = struct.unpack_from("<fi", data, offset)
        pieces.append((score, data[offset + 8 : offset + 8 + length].decode()))
        offset += 8 + length
    number = {text: i for i, (_, text) in enumerate(pieces) if i >= 259}
    ids = [number[" "]]
    for character in text:
        ids += [number[character]] if character in number else [byte + 3 for byte in character.encode()]
    while True:
        merges = [
            (pieces[number[joined]][0], -i, number[joined])
            for i, (a, b) in enumerate(pairwise(ids))
            if (joined := pieces[a][1] + pieces[b][1]) in number
        ]
        if not merges:
            return ids
        _, place, merged = max(merges)
        ids[-place : -place + 2] = [merged]


@pytest.fixture
def tokenizer(real_data, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(real_data / "tiny_lms/tok512.bin"))
    return Tokenizer(tmp_path / "tokenizer.model")


def test_ids_are_those_of_run_c(tokenizer, real_data):
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)
    for text in (STORY, "Lily", "\tx", "thethe the"):
        assert tokenizer.encode(text) == literal_encode(real_data / "tiny_lms/tok512.bin", text)
        assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


def test_files_that_are_no_tokenizer(real_data, tmp_path):
    good = (real_data / "tiny_lms/tok512.bin").read_bytes()
    path = tmp_path / "tok.bin"
    for content, named in [
        (good[:-3], "a piece of"),
        (good[:3000], "a piece of|unpack"),
        (good[:600], "a piece of|pieces: not|unpack"),
        (good.replace(b"<0x41>", b"<0x42>"), "not a byte"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=named) as caught:
            sentencepiece_model(path)
        assert str(path) in str(caught.value)
    with pytest.raises(UserError, match=r"nowhere.bin: no such file"):
        sentencepiece_model(tmp_path / "nowhere.bin")
