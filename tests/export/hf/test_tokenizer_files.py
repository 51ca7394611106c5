"""An exported tokenizer gives the ids of ours: for a BPE model by tokenizer.json, for others by a class."""

import io
import json
import random
import shutil

import pytest
import sentencepiece

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from data_prep.train_tokenizer import cut, train_tokenizer  # noqa: E402
from dualroute.compress.added_tokens import with_added_tokens  # noqa: E402
from dualroute.data.tokenizer import Tokenizer  # noqa: E402
from dualroute.data.tokenizer_settings import TokenizerSettings  # noqa: E402
from dualroute.evaluate.perplexity import read_text  # noqa: E402
from dualroute.export.hf.tokenizer_files import marked_texts, trial_texts, write_tokenizer  # noqa: E402
from tests.conftest import WORDS  # noqa: E402


@pytest.fixture
def exported(tmp_path):
    """Export a tokenizer file: (ours, the one that AutoTokenizer loads, where its ids come from)."""

    def make(path, **options):
        ours = Tokenizer(path)
        folder = tmp_path / "exported"
        folder.mkdir(exist_ok=True)
        source, _ = write_tokenizer(ours, folder, **options)
        return ours, transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True), source

    return make


def same_ids(ours, theirs, texts):
    """Of text as text; and a special token at its end is one, as for every tokenizer of transformers."""
    as_text = {"split_special_tokens": True}
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False, **as_text).input_ids == ids, repr(text)
        assert theirs(text, **as_text).input_ids == [ours.bos_id, *ids]
    marked = marked_texts(ours)
    assert marked
    for text, ids in marked:
        assert theirs(text, add_special_tokens=False).input_ids == ids, text


def random_texts(pieces, count=300):
    """Texts of few symbols, where merges compete most."""
    draw = random.Random(1)
    for _ in range(count):
        letters = list("".join(draw.sample(pieces, 2)) + draw.choice(" \n\t\u2581"))
        yield "".join(draw.choices(letters, k=draw.randint(1, 60)))


def test_a_bpe_model(exported, tiny_dataset, tmp_path):
    ours, theirs, source = exported(tiny_dataset / "tokenizer.model")
    assert source == "tokenizer.json"
    same_ids(ours, theirs, trial_texts(ours, ["The old  river.\n\tSees"]))
    same_ids(ours, theirs, random_texts([word for word in ours.pieces() if word.isalpha()]))
    for text in ("Häuser 漢字 \u2581 😀\n\n  end ", " x"):
        assert theirs.decode(ours.encode(text)) == text
    batch = theirs(["The old river", "The"], return_tensors="pt", padding=True)
    assert batch.input_ids[1, 0] == theirs.pad_token_id == ours.pad_id
    assert theirs.padding_side == "left"
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    same_ids(ours, again, trial_texts(ours, []))


def test_a_model_with_thousands_of_pieces(exported, real_data, tmp_path):
    path = real_data / "tinyshakespeare" / "input.txt.gz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    text = read_text(path)[:400_000]
    (tmp_path / "bpe.model").write_bytes(train_tokenizer(cut(text), 3000))
    ours, theirs, source = exported(tmp_path / "bpe.model")
    assert source == "tokenizer.json"
    same_ids(ours, theirs, [text[start : start + 5000] for start in range(0, 100_000, 10_000)])
    same_ids(ours, theirs, random_texts([piece for piece in ours.pieces() if piece.isalpha()]))


def test_a_unigram_model(exported, tmp_path):
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 50))) for _ in range(300)]
    (tmp_path / "unigram.model").write_bytes(train_tokenizer(texts, 315, "unigram", 0))
    ours, theirs, source = exported(tmp_path / "unigram.model")
    assert source == "tokenizer.model"
    assert type(theirs).__name__ == "DualRoutingTokenizer"
    same_ids(ours, theirs, trial_texts(ours, texts[:1]))
    assert theirs.decode(theirs("the old 漢 river").input_ids, skip_special_tokens=True) == "the old 漢 river"
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    same_ids(ours, again, trial_texts(ours, []))


def test_a_checkpoint_whose_tokenizer_is_a_json_file(exported, tmp_path):
    """As converted models have: byte-level, here with a special in use and one out of use."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    fast.train_from_iterator([" ".join(WORDS) * 20, "naïve 漢字"], trainer)
    fast.save(str(tmp_path / "tokenizer.model"))
    ours, theirs, source = exported(tmp_path / "tokenizer.model")
    assert source == "tokenizer.json"
    assert theirs.bos_token == theirs.eos_token == "<|endoftext|>"
    same_ids(ours, theirs, trial_texts(ours, ["<|endoftext|> is text"]))
    assert not (tmp_path / "exported" / "tokenizer.model").exists()


def test_a_model_with_habits_of_its_own(exported, real_data):
    """A space in front of every text, white space folded, no bytes for the unknown: the class keeps them."""
    path = real_data / "tokenizers" / "sp_test_model.model"
    if not path.is_file():
        pytest.skip(f"no {path}")
    ours, theirs, source = exported(path)
    assert source == "tokenizer.model"
    same_ids(ours, theirs, trial_texts(ours, []))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_chat_has_the_ids_of_ours(kind, tmp_path):
    """The template, and an end of answers of its own, travel; a template's specials are ids."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 50))) for _ in range(300)]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_tokenizer(texts, 315, kind, 4))
    source = Tokenizer(path).chat_template.source
    said = TokenizerSettings(source.replace("<eos>", "<reserved_1>"), {"eos_token": "<reserved_1>"}, (2, 5))
    ours = Tokenizer(path, said)
    (tmp_path / "out").mkdir()
    write_tokenizer(ours, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    messages = [{"role": "user", "content": "the old river"}, {"role": "assistant", "content": "a house"}]
    assert theirs.apply_chat_template(messages, return_dict=True)["input_ids"] == ours.chat(messages).ids
    assert ours.chat(messages).ids[0] == ours.bos_id
    assert theirs.eos_token_id == 5
    assert Tokenizer(tmp_path / "out" / "tokenizer.model").settings.chat_template == said.chat_template


@pytest.mark.parametrize("user_defined", [False, True])
def test_a_model_like_llamas(exported, tmp_path, user_defined):
    """BPE with bytes that puts a space before every text: a tokenizer.json, without pieces of its own."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 50))) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["house"] if user_defined else [],
        minloglevel=2,
    )
    (tmp_path / "llama.model").write_bytes(model.getvalue())
    ours, theirs, source = exported(tmp_path / "llama.model")
    assert source == ("tokenizer.model" if user_defined else "tokenizer.json")
    same_ids(ours, theirs, trial_texts(ours, texts[:2]))
    same_ids(ours, theirs, random_texts([piece for piece in ours.pieces() if piece.isalpha()]))
    for text in ("the old river", " x", "  two", "a\n b 水"):
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text)) == text


def test_a_token_that_was_added_to_a_model(exported, tiny_dataset, tmp_path):
    """By convert, which puts it into the model: it is found in texts here and there."""
    folder = tmp_path / "source"
    folder.mkdir()
    shutil.copy(tiny_dataset / "tokenizer.model", folder / "tokenizer.model")
    added = {"320": {"content": "<note>", "special": False}, "321": {"content": "<|x|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    (tmp_path / "more.model").write_bytes(with_added_tokens(folder / "tokenizer.model"))
    ours, theirs, source = exported(tmp_path / "more.model")
    assert source == "tokenizer.json"
    same_ids(ours, theirs, ["the <note> river<note>", *trial_texts(ours, [])])
    assert ours.encode("the <note>")[-1] == 320
    assert ours.same_ids(Tokenizer(tmp_path / "exported" / "tokenizer.json"))


@pytest.fixture(params=["bpe", "unigram"])
def trained(request, tmp_path):
    """A tokenizer.model that becomes a tokenizer.json, and one that the class reads."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 50))) for _ in range(300)]
    path = tmp_path / "trained.model"
    path.write_bytes(train_tokenizer(texts, 320 if request.param == "bpe" else 315, request.param, 0))
    return path


def test_special_tokens_in_a_text(exported, trained):
    ours, theirs, _ = exported(trained)
    text = "the old river"
    ids = [ours.bos_id, *ours.encode(text), ours.eos_id]
    assert theirs(text + theirs.eos_token).input_ids == ids
    assert theirs.decode(ids) == f"<bos>{text}<eos>"
    assert theirs.decode(ids, skip_special_tokens=True) == text
    theirs.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    chat = [{"role": "user", "content": "the river"}, {"role": "assistant", "content": "a house"}]
    got = theirs.apply_chat_template(chat, return_dict=True)["input_ids"]
    first, second = (ours.encode(part) for part in ("user: the river", "assistant: a house"))
    assert got == [ours.bos_id, *first, ours.eos_id, *second, ours.eos_id]


def test_which_tokens_are_special(exported, trained):
    ours, theirs, _ = exported(trained)
    for texts in (("the old river",), ("the old", "river")):
        out = theirs(*texts, return_special_tokens_mask=True)
        assert len(out.special_tokens_mask) == len(out.input_ids)
        assert [
            token for token, mark in zip(out.input_ids, out.special_tokens_mask, strict=True) if mark
        ] == [ours.bos_id] * len(texts)
        assert theirs.get_special_tokens_mask(out.input_ids, already_has_special_tokens=True) == list(
            out.special_tokens_mask
        )


def test_added_tokens(exported, trained, tmp_path):
    ours, theirs, _ = exported(trained)
    assert theirs.add_tokens(["<note>"]) == 1
    assert theirs.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]}) == 1
    assert len(theirs) == ours.vocab_size + 2
    text = "the old<note>river<|im_end|>"
    ids = theirs(text, add_special_tokens=False).input_ids
    assert ids == [*ours.encode("the old"), ours.vocab_size, *ours.encode("river"), ours.vocab_size + 1]
    assert theirs.decode(ids) == text
    assert theirs.decode(ids, skip_special_tokens=True) == "the old<note>river"
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again(text, add_special_tokens=False).input_ids == ids
    assert again.decode(ids) == text


def test_the_tokenizer_of_a_model_of_a_task_ends_each_text(exported, trained, tmp_path):
    ours, theirs, _ = exported(trained, ends=True)
    first, second = ours.encode("the old"), ours.encode("river")
    assert theirs("the old").input_ids == [ours.bos_id, *first, ours.eos_id]
    pair = [ours.bos_id, *first, ours.eos_id, *second, ours.eos_id]
    assert theirs("the old", "river").input_ids == pair
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again("the old", "river").input_ids == pair
