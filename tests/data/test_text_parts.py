"""A text that is cut gives the ids of the whole, for every kind of sentencepiece model."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import pytest
import sentencepiece

from data_prep.train_tokenizer import train_tokenizer
from dualroute.data import text_parts
from dualroute.data.llama2c_tokenizer import sentencepiece_model
from dualroute.data.text_parts import SPACE_MARK, _fields
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from tests.conftest import WORDS

VOCABULARY = [*WORDS, "水", "火曜日", "été", "12", "of the"]
LINES = [" ".join(random.Random(n).choices(VOCABULARY, k=12)) for n in range(900)]
#: What texts are made of: words, all kinds of space, marks of sentencepiece, what no vocabulary has, what
#: normalisation rewrites.
SCRAPS = [
    *VOCABULARY,
    " ",
    " ",
    "  ",
    "\n",
    "\t",
    "e\u0301",
    "\U0001f600",
    "\U0010fffe",
    "ﬁ",
    "\u00a8",
    "\u00a0",
]
SCRAPS += [SPACE_MARK, f"{SPACE_MARK} "]


def model(**options: object) -> bytes:
    """A model of sentencepiece with its text left as it is, unless ``options`` say otherwise."""
    stream = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "vocab_size": 330,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=stream, **{**defaults, **options}
    )
    return stream.getvalue()


NO_FALLBACK = {"byte_fallback": False, "vocab_size": 160, "character_coverage": 0.98}
#: name → how to make the model, and whether it can be cut inside a line
KINDS = {
    "bpe": (lambda: train_tokenizer(LINES, 420, "bpe", reserved_tokens=0), True),
    "unigram": (lambda: train_tokenizer(LINES, 330, "unigram", reserved_tokens=0), True),
    "llama": (lambda: model(add_dummy_prefix=True), True),
    "llama_unigram": (lambda: model(add_dummy_prefix=True, model_type="unigram"), True),
    "no_fallback": (lambda: model(**NO_FALLBACK), True),
    "no_fallback_llama": (lambda: model(**NO_FALLBACK, add_dummy_prefix=True), True),
    "characters": (lambda: model(model_type="char"), True),
    "space_behind": (lambda: model(treat_whitespace_as_suffix=True), True),
    "space_behind_added": (lambda: model(treat_whitespace_as_suffix=True, add_dummy_prefix=True), False),
    "words_joined": (lambda: model(split_by_whitespace=False), True),
    "symbols": (lambda: model(user_defined_symbols=["of the", "\n", f"red{SPACE_MARK}small"]), True),
    "nfkc": (lambda: model(normalization_rule_name="nfkc"), False),
    "folds_spaces": (lambda: model(remove_extra_whitespaces=True), False),
    "t5": (lambda: model(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True), False),
}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request, tmp_path_factory):
    make, cut_inside_lines = KINDS[request.param]
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    path.write_bytes(make())
    return Tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path)), cut_inside_lines


def test_random_texts_have_the_ids_of_the_whole(kind, monkeypatch):
    tokenizer, reference, cut_inside_lines = kind
    draw, cuts = random.Random(0), 0
    for _ in range(150):
        monkeypatch.setattr(text_parts, "PART_CHARS", draw.choice([1, 2, 7, 30]))
        scraps = draw.choices(SCRAPS, k=draw.randrange(60))
        text = draw.choice(["", " "]).join(scraps)
        if tokenizer._space_mark_ids:  # spelled in bytes, which sentencepiece itself does not do
            text = text.replace(SPACE_MARK, "")
        assert tokenizer.encode(text) == reference.encode(text)
        assert tokenizer.encode_array(text).tolist() == reference.encode(text)
        line = text.replace("\n", " ")
        cuts += len(list(tokenizer._parts(line))) - bool(line)
    assert cut_inside_lines == (cuts > 100)


def test_a_long_line_is_handed_over_in_pages(kind):
    tokenizer, reference, cut_inside_lines = kind
    text = " ".join(LINES)
    assert tokenizer.encode(text) == reference.encode(text)
    if cut_inside_lines:
        assert max(map(len, tokenizer._parts(text))) < text_parts.PART_CHARS + 200


def test_what_cannot_be_cut_is_not(kind):
    """A run of spaces, which has pieces of several lengths, and a text that ends with one."""
    tokenizer, reference, _ = kind
    for text in (" " * 10_000, "a" + " " * 10_000, ("a" * 4000 + " ") * 2, " ".join(LINES)[:9000] + " "):
        assert tokenizer.encode(text) == reference.encode(text)


@pytest.mark.parametrize("tokenizer_type", ["bpe", "unigram"])
def test_books(real_data, tmp_path, tokenizer_type):
    """Real text in one line, cut at random lengths."""
    with tarfile.open(real_data / "english_books" / "books.tar.xz") as archive:
        member = next(member for member in archive if member.name.endswith(".txt"))
        text = archive.extractfile(member).read(400_000).decode(errors="ignore")
    lines = text.splitlines(keepends=True)
    (tmp_path / "m.model").write_bytes(train_tokenizer(lines, 2000, tokenizer_type))
    check_cuts(Tokenizer(tmp_path / "m.model"), " ".join(text.split()))


def test_the_tokenizer_of_llama2c(real_data, tmp_path):
    (tmp_path / "m.model").write_bytes(sentencepiece_model(real_data / "tiny_lms/tok512.bin"))
    check_cuts(Tokenizer(tmp_path / "m.model"), " ".join(LINES))


def check_cuts(tokenizer: Tokenizer, text: str) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    draw = random.Random(1)
    with pytest.MonkeyPatch.context() as patch:
        for _ in range(40):
            patch.setattr(text_parts, "PART_CHARS", draw.randrange(1, 400))
            start = draw.randrange(len(text) - 4000)
            excerpt = text[start : start + draw.randrange(4000)]
            assert tokenizer.encode(excerpt) == reference.encode(excerpt)


@pytest.mark.parametrize("data", [b"\xff", b"\x1a\x05ab", b"\x80" * 20, b"\x0b"])
def test_bytes_that_are_no_message(data):
    with pytest.raises((ValueError, IndexError)):
        list(_fields(memoryview(data)))


def test_a_piece_that_is_not_utf8(tmp_path):
    data = train_tokenizer(LINES, 420, "bpe", reserved_tokens=0)
    path = tmp_path / "m.model"
    path.write_bytes(data.replace("曜".encode(), b"\xe6\x9b\x41", 1))
    with pytest.raises(UserError, match=r"m\.model: damaged, one of its pieces is not UTF-8; copy"):
        Tokenizer(Path(path))
