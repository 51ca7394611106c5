"""decode(encode(text)) == text, for every text, with a tokenizer of ours."""

from __future__ import annotations

import io
import pickle
import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from data_prep.train_tokenizer import train_tokenizer
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError

TEXT = [
    f"def f{n}(x):\n    if x == {n}:\n\treturn  'été {n}'\n\n# the word number {n} is here\n"
    for n in range(200)
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(TEXT, 302, request.param, reserved_tokens=4))
    return Tokenizer(path)


# whitespace, internal marks of sentencepiece, names of specials, and anything else
PIECES = st.sampled_from(
    [" ", "  ", "\n", "\t", "\u2581", "\u2585", "\0", "<bos>", "<0x41>", "<reserved_0>", "return"]
)


@given(text=st.lists(st.one_of(PIECES, st.text(max_size=8)), max_size=12).map("".join))
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(max_size=20))
def test_text_never_makes_a_special_and_needs_no_unknown(tokenizer, text):
    ids = tokenizer.encode(text)
    specials = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id, *range(4, 8)}
    assert specials.isdisjoint(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_bos_and_eos_frame_the_text_and_vanish_in_decoding(tokenizer):
    ids = tokenizer.encode("  word\n", bos=True, eos=True)
    assert ids == [tokenizer.bos_id, *tokenizer.encode("  word\n"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "  word\n"
    assert tokenizer.encode("", bos=True, eos=True) == [tokenizer.bos_id, tokenizer.eos_id]


def test_a_long_text_is_its_lines(tokenizer):
    """Books are encoded page by page; that must not show."""
    text = "".join(TEXT * 3)
    assert len(text) > 20_000
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    assert ids == [i for line in text.splitlines(keepends=True) for i in reference.encode(line)]


def test_a_long_line_is_encoded_as_if_it_were_not_cut(tokenizer):
    text = TEXT[0].replace("\n", " ") * 500
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    assert tokenizer.encode(text + "\n" + text) == reference.encode(text + "\n" + text)


def test_the_specials_have_fixed_ids(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 302


def test_newlines_and_tabs_are_tokens_of_their_own(tokenizer):
    newline, tab = tokenizer.encode("\n"), tokenizer.encode("\t")
    assert len(newline) == len(tab) == 1
    for word in ("return", "the", "x", " "):
        assert tokenizer.encode(f"{word}\n\t{word}") == [
            *tokenizer.encode(word), *newline, *tab, *tokenizer.encode(word),
        ]  # fmt: skip


def test_ids_of_a_long_text_are_never_all_python_integers(tokenizer):
    text = " ".join(TEXT * 20)
    tokenizer.encode(text[:10_000])
    tracemalloc.start()
    ids = tokenizer.encode_array(text, "<u2", bos=True, eos=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * ids.size + 300_000  # two bytes an id, twice; a list would take 8 and more
    assert ids.tolist() == tokenizer.encode(text, bos=True, eos=True)


def test_threads_agree_with_one_thread(tokenizer):
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokenizer.encode, TEXT)) == [tokenizer.encode(text) for text in TEXT]


def test_a_pickled_tokenizer_is_the_same(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.sha256 == tokenizer.sha256
    assert again.encode(TEXT[0]) == tokenizer.encode(TEXT[0])


@pytest.mark.parametrize("wrong", [-1, 302, 10**6])
def test_an_id_outside_the_vocabulary(tokenizer, wrong):
    with pytest.raises(UserError, match=f"token id {wrong} is not in the vocabulary"):
        tokenizer.decode([5, wrong])


def test_missing_file_and_foreign_file(tmp_path):
    with pytest.raises(UserError, match=r"no\.model: no such file"):
        Tokenizer(tmp_path / "no.model")
    for name, data in (("empty.model", b""), ("text.model", b"this is not a model" * 10)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: not a sentencepiece model"):
            Tokenizer(tmp_path / name)


def test_damaged_models(tokenizer, tmp_path):
    """A bit, or a piece of the file, is not what it was: refused in one line, or a model all the same."""
    original, lines = tokenizer.path.read_bytes(), []
    for seed in range(80):
        draw, data = random.Random(seed), bytearray(original)
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path = tmp_path / "damaged.model"
        path.write_bytes(data if seed % 2 else data[: draw.randrange(len(data))])
        try:
            damaged = Tokenizer(path)
        except UserError as error:
            lines.append(str(error))
        else:
            assert isinstance(damaged.decode(damaged.encode(TEXT[0])), str)
    assert len(lines) > 40
    assert all(line.startswith(f"tokenizer {path}: ") and "\n" not in line for line in lines)


def test_a_model_that_is_too_large(tokenizer, monkeypatch):
    monkeypatch.setattr("dualroute.data.tokenizer.MAX_FILE_BYTES", 1000)
    with pytest.raises(UserError, match=r"longer than the 1,000 bytes .*; give a sentencepiece"):
        Tokenizer(tokenizer.path)


def test_a_model_with_a_dummy_space_is_not_fed_piecewise(tmp_path):
    """Llama's convention: the ids of a text with U+2581 must be those that sentencepiece gives."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    path = tmp_path / "llama.model"
    path.write_bytes(model.getvalue())
    tokenizer = Tokenizer(path)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    text = "word\u2581word\n" * 1000
    assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.pad_id == -1
