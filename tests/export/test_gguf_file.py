"""A GGUF file holds the model to the last bit, and llama.cpp computes the same from it."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

from data_prep.train_tokenizer import train_tokenizer  # noqa: E402
from dualroute.cli import main  # noqa: E402
from dualroute.data.tokenizer import Tokenizer  # noqa: E402
from dualroute.errors import UserError  # noqa: E402
from dualroute.evaluate.load import Loaded, load  # noqa: E402
from dualroute.export import gguf_file  # noqa: E402
from dualroute.export.gguf_tokenizer import BYTE, CONTROL, USER_DEFINED, vocabulary  # noqa: E402
from dualroute.model.checkpoint.format import save_model  # noqa: E402
from tests.conftest import WORDS  # noqa: E402
from tests.export.conftest import tiny_model  # noqa: E402
from tests.export.hf.test_transformers_layout import LAYOUTS  # noqa: E402

KINDS = [kind for kind, (name, _) in LAYOUTS.items() if name != "Mistral"]
TEXTS = [
    "Once upon a time, the old river.",
    "  two  spaces\n\n\tand lines \n",
    "水の中、汉字 和 emoji 😀👩‍👩‍👧 é",
    "",
    " ",
    "12345 don't <bos> <eos>",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_file_is_the_model(kind, dtype, loaded, tmp_path):
    made = loaded(dtype, **LAYOUTS[kind][1])
    gguf_file.write(made, tmp_path / "model.gguf", dtype, "name")
    found = gguf_file.compare(made, tmp_path / "model.gguf", dtype)
    parameters = dict(made.model.named_parameters())
    joined = sum("qkv" in name for name in parameters)
    assert found["tensors"] == len(parameters) + 2 * joined + (kind == "llama3")
    assert found["largest_difference"] == 0
    config = made.model.config
    field = gguf.GGUFReader(tmp_path / "model.gguf").get_field
    arch = gguf_file.architecture(config)
    assert field(f"{arch}.attention.head_count_kv").contents() == config.num_kv_heads
    assert math.isclose(field(f"{arch}.rope.freq_base").contents(), config.rope_theta)
    assert field("tokenizer.ggml.eos_token_id").contents() == 2
    assert field("tokenizer.ggml.add_bos_token").contents()


def test_rows_of_a_llama_are_reordered_as_llama_cpp_reads_them(loaded, tmp_path):
    """Neighbours there are the halves here."""
    made = loaded(attention="dense")
    gguf_file.write(made, tmp_path / "model.gguf", "float32", "name")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    ours = made.model.layers[1].attention.global_qkv.weight.detach().numpy()
    dim = made.model.config.head_dim
    assert np.array_equal(found["blk.1.attn_q.weight"][0], ours[0])
    assert np.array_equal(found["blk.1.attn_q.weight"][1], ours[dim // 2])
    assert np.array_equal(found["blk.1.attn_k.weight"][2], ours[32 + 1])
    assert np.array_equal(found["blk.1.attn_v.weight"], ours[64:])


def test_rounded_weights(loaded, tmp_path):
    made = loaded(attention="dense", ffn_dim=80)  # no multiple of 32: rows of the last product stay float16
    sizes, differences = [], []
    for kind in ("float32", "float16", "q8_0"):
        gguf_file.write(made, tmp_path / kind, kind, "name")
        differences.append(gguf_file.compare(made, tmp_path / kind, kind)["largest_difference"])
        sizes.append((tmp_path / kind).stat().st_size)
    assert sizes == sorted(sizes, reverse=True)
    assert 0 == differences[0] < differences[1] < differences[2] < 0.02
    data = bytearray((tmp_path / "float32").read_bytes())
    data[-5] ^= 1
    (tmp_path / "float32").write_bytes(data)
    with pytest.raises(UserError, match="is not what was to be written: not published"):
        gguf_file.compare(made, tmp_path / "float32", "float32")
    with torch.no_grad():
        made.model.layers[0].ffn.up.weight[0, 0] = 1e6
    with pytest.raises(UserError, match=r"blk\.0\.ffn_up\.weight has weights beyond float16"):
        gguf_file.write(made, tmp_path / "large", "float16", "name")


def test_the_command(checkpoint, tmp_path, capsys):
    source, output = checkpoint(attention="dense").folder, tmp_path / "out"
    options = ["--checkpoint", str(source), "--format", "gguf", "--output", str(output)]
    assert main(["export", *options, "--quantize", "true"]) == 0
    figures = json.loads((output / "export.json").read_text())
    assert (figures["architecture"], figures["type"]) == ("llama", "q8_0")
    assert 0 < figures["parity"]["largest_difference"] < 0.02
    card = (output / "README.md").read_text()
    assert 'Llama("path/to/this/folder/model.gguf"' in card
    assert "1. pretrain: c (1,234 tokens in 7 steps; context 64; validation loss 3.5000)" in card
    assert main(["export", *options]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "its attention is dual"),
        ({"attention": "local"}, "its attention is local, and llama.cpp's Llama has no sliding window"),
        ({"attention": "dense", "gate": True}, "its heads have gates"),
        ({"attention": "dense", "global_rotary_factor": 0.5}, "RoPE turns a part of its heads"),
    ],
)
def test_what_llama_cpp_does_not_compute(options, said, checkpoint, tmp_path, capsys):
    source = checkpoint(**options).folder
    arguments = ["--checkpoint", source, "--format", "gguf", "--output", tmp_path / "out"]
    assert main(["export", *map(str, arguments)]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "use --format hf, or distil it into a model with attention dense" in told
    assert not (tmp_path / "out").exists()


def byte_level(tokenizers, path, expression=None, normalizer=None):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)]
    if expression is not None:
        pattern = tokenizers.Regex(expression)
        steps.insert(0, tokenizers.pre_tokenizers.Split(pattern, "isolated"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps) if expression else steps[0]
    made.decoder = tokenizers.decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([" ".join(WORDS) * 5], trainer)
    made.save(str(path))
    return Tokenizer(path)


def sentencepiece(path, kind="bpe"):
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 50))) + "\n" for _ in range(300)]
    path.write_bytes(train_tokenizer(texts, 320, kind, 4))
    return Tokenizer(path)


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EXPRESSIONS = {"gpt-2": None, "qwen2": QWEN2, "llama-bpe": QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")}


@pytest.mark.parametrize("pre", EXPRESSIONS)
def test_byte_level_tokenizers(pre, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = byte_level(tokenizers, tmp_path / "tokenizer.json", EXPRESSIONS[pre])
    words = vocabulary(tokenizer)
    assert (words.model, words.pre) == ("gpt2", pre)
    assert words.kinds[:3] == [CONTROL, CONTROL, 1]
    assert words.pieces == tokenizer.pieces()
    assert all(a + b in words.pieces for a, b in (merge.split(" ") for merge in words.merges))


def test_sentencepiece_and_what_is_refused(tmp_path, real_data):
    words = vocabulary(sentencepiece(tmp_path / "bpe.model"))
    assert (words.model, words.space_in_front) == ("llama", False)
    assert words.kinds[:5] == [CONTROL, CONTROL, CONTROL, 2, CONTROL]
    assert words.kinds.count(BYTE) == 256
    assert words.kinds[words.pieces.index("\n")] == USER_DEFINED
    tokenizers = pytest.importorskip("tokenizers")
    for tokenizer, said in (
        (sentencepiece(tmp_path / "unigram.model", "unigram"), "it is a unigram model"),
        (Tokenizer(real_data / "tokenizers" / "sp_test_model.model"), "it "),
        (
            byte_level(tokenizers, tmp_path / "a.json", r"\w+"),
            "no byte-level BPE with the expression of GPT-2",
        ),
        (byte_level(tokenizers, tmp_path / "b.json", None, tokenizers.normalizers.Lowercase()), "rewrites"),
    ):
        with pytest.raises(UserError, match=f"{said}.* use --format hf"):
            vocabulary(tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_the_same(kind, tmp_path):
    """Logits and ids, of every architecture and every kind of tokenizer."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    pre = {"bias": "qwen2", "norms": "qwen2", "llama3": "llama-bpe", "grouped": "gpt-2"}.get(kind)
    if pre is None:
        tokenizer = sentencepiece(tmp_path / "tokenizer.model")
    else:
        tokenizer = byte_level(tokenizers, tmp_path / "tokenizer.json", EXPRESSIONS[pre])
    # rows of llama.cpp's products are multiples of 32
    options = {**LAYOUTS[kind][1], "dim": 64, "head_dim": 16}
    model = tiny_model(tokenizer.vocab_size, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(2)
    made: Loaded = load(save_model(model, tmp_path / "c", tokenizer.path, {}).folder, "cpu")
    gguf_file.write(made, tmp_path / "model.gguf", "float32", "name")
    theirs = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=192, logits_all=True, verbose=False, n_threads=1, n_gpu_layers=0,
        type_k=0, type_v=0,  # float32: a cache of halves, the default there, costs three digits
    )  # fmt: skip
    for text in TEXTS:
        ids = theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == tokenizer.encode(text), repr(text)
    ids = torch.randint(8, tokenizer.vocab_size, (1, 150), generator=torch.Generator().manual_seed(0))
    theirs.eval(ids[0].tolist())
    got = torch.tensor(np.array(theirs.scores[:150]))
    with torch.no_grad():
        torch.testing.assert_close(got, made.model(ids)[0], rtol=0, atol=1e-3)
