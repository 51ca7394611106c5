"""A Hugging Face tokenizer.json is a tokenizer like any other."""

import gzip
import json
import pickle
import random
import sys

import pytest

from dualroute.data import text_parts
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError

TEXTS = [
    "Once upon a time,\n\n  there was “a” girl.\tShe's 12.\n",
    " leading and trailing ",
    "Ω ≠ é 水 \U0001f600",
    "",
    "text that names <|endoftext|> stays text",
]


@pytest.fixture(scope="module")
def tokenizers():
    return pytest.importorskip("tokenizers")


def byte_level(tokenizers, vocab, merges):
    """GPT-2's kind."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def path(tokenizers, tmp_path_factory):
    tokenizer = byte_level(tokenizers, {}, [])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.enable_truncation(4)  # as some files have it: it must not cut documents
    path = tmp_path_factory.mktemp("json") / "tokenizer.model"
    path.write_text(tokenizer.to_str())
    return path


def test_texts_come_back_and_specials_stay_out(path):
    tokenizer = Tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 0, -1)
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert ids[0] == ids[-1] == 0
        assert 0 not in ids[1:-1]
        assert tokenizer.decode(ids) == text
        assert max(ids) < tokenizer.vocab_size
    assert pickle.loads(pickle.dumps(tokenizer)).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    with pytest.raises(UserError, match="token id 1000"):
        tokenizer.decode([1000])


def test_the_same_ids(path, tmp_path):
    tokenizer = Tokenizer(path)
    content = json.loads(path.read_text())
    (tmp_path / "spaced.json").write_text(json.dumps(content, indent=3))
    assert tokenizer.same_ids(Tokenizer(tmp_path / "spaced.json"))
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "other.json").write_text(json.dumps(content))
    assert not tokenizer.same_ids(Tokenizer(tmp_path / "other.json"))


def test_gpt2(tokenizers, real_data, tmp_path):
    """The published vocabulary gives the published ids."""
    folder = real_data / "tokenizers/gpt2"
    vocab = json.loads(gzip.decompress((folder / "encoder.json.gz").read_bytes()))
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    built = byte_level(tokenizers, vocab, [tuple(line.split()) for line in lines if line])
    built.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "tokenizer.json").write_text(built.to_str())
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (50257, 50256, 50256)
    assert tokenizer.encode("Hello world, this is GPT-2.") == [
        15496,
        995,
        11,
        428,
        318,
        402,
        11571,
        12,
        17,
        13,
    ]


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SCRAPS = [
    "a",
    "the",
    "Bird",
    "'s",
    " ",
    " ",
    "  ",
    "\n",
    "\n",
    "\r\n",
    "\t",
    ".",
    "。",
    "水",
    "é",
    "e\u0301",
    "\u0301",
]
SCRAPS += [
    "12",
    "1234",
    "\u00a0",
    "\u2028",
    "\u200b",
    "\x1c",
    "\x85",
    "\u3000",
    "<|endoftext|>",
    "<tool>",
    "²",
]


@pytest.fixture(params=["gpt2", "llama3", "qwen2", "other expression", "prefix", "lowercase", "wide token"])
def kind(request, path, tmp_path):
    content = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False}
    bytes_only = {**content["pre_tokenizer"], "use_regex": False}
    content["added_tokens"].append(
        {**content["added_tokens"][0], "id": 300, "content": "<tool>", "special": False}
    )
    if request.param in ("llama3", "qwen2", "other expression"):
        if request.param == "qwen2":
            split["pattern"] = {"Regex": LLAMA_3.replace("{1,3}", "")}
            content["normalizer"] = {"type": "NFC"}
        if request.param == "other expression":
            split["pattern"] = {"Regex": r"\w+ \w+|\s"}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_only]}
    if request.param == "prefix":
        content["pre_tokenizer"]["add_prefix_space"] = True
    if request.param == "lowercase":
        content["normalizer"] = {"type": "Lowercase"}
    if request.param == "wide token":
        content["added_tokens"][-1]["content"] = "Bird a"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer(tmp_path / "tokenizer.json"), request.param in ("gpt2", "llama3", "qwen2")


def test_a_text_that_is_cut_has_the_ids_of_the_whole(kind, monkeypatch):
    tokenizer, is_cut = kind
    draw, cuts = random.Random(0), 0
    for _ in range(1000):
        monkeypatch.setattr(text_parts, "PART_CHARS", draw.choice([1, 3, 10]))
        text = "".join(draw.choices(SCRAPS, k=draw.randrange(40)))
        cuts += len(list(tokenizer._parts(text))) - bool(text)
        whole = tokenizer._processor.encode(text)
        assert tokenizer.encode(text) == whole, text
    assert is_cut == (cuts > 200)


def test_tokens_spell_the_bytes_of_a_text(kind):
    tokenizer, _ = kind
    spelled = tokenizer.token_bytes()
    for text in ["".join(SCRAPS), "a bird é中🙂", "Bird a <tool>"]:
        ids = tokenizer.encode(text)
        assert b"".join(spelled[number] for number in ids) == tokenizer.decode(ids).encode()
    assert spelled[tokenizer.eos_id] == b""


def test_a_dataset_is_prepared_with_it(path, tmp_path):
    from data_prep.prepare import PrepareConfig, prepare
    from dualroute.data.manifest import Manifest
    from tests.conftest import write_corpus

    write_corpus(tmp_path / "corpus", 20)
    prepare(
        PrepareConfig(
            corpus=str(tmp_path / "corpus"), output=str(tmp_path / "shards"), tokenizer=str(path),
            val_fraction=0.2, progress=False,
        )
    )  # fmt: skip
    info = Manifest.load(tmp_path / "shards").tokenizer
    assert (info.sha256, info.bos_id, info.eos_id, info.pad_id) == (Tokenizer(path).sha256, 0, 0, 0)


def test_files_that_are_no_tokenizer(tmp_path, tokenizers, path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer.json") as caught:
        Tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)
    content = json.loads(path.read_text())
    for damage in (
        {"model": {**content["model"], "vocab": {}, "merges": []}, "added_tokens": []},
        {"added_tokens": 5},
        {"model": None},
        {"model": {**content["model"], "vocab": {"a": -1}}},
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **damage}))
        with pytest.raises(UserError, match=r"^tokenizer .*tokenizer.json: ") as caught:
            Tokenizer(tmp_path / "tokenizer.json")
        assert "\n" not in str(caught.value)
    wrong_id = {**content, "added_tokens": [{**content["added_tokens"][0], "id": 1 << 31}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(wrong_id))
    assert Tokenizer(tmp_path / "tokenizer.json").bos_id == Tokenizer(path).bos_id
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[export\]'"):
        Tokenizer(path)
