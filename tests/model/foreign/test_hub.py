"""Foreign models give the logits that their own library gives."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import save_model
from dualroute.model.foreign.hub import load_causal_lm, load_dense

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "rope_theta": 500.0}),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-sliding": ("Mistral", {"sliding_window": 24}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@torch.no_grad()
def random_model(transformers, family, **changes):
    """A tiny model with weights far from their initial values: norms and biases take part too."""
    name, more = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **more, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
    return model


@pytest.fixture(scope="module")
def llama(transformers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    random_model(transformers, "llama").save_pretrained(folder)
    return folder


def ids(length, rows=2, vocab=97):
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(1))


def edited(source, target, **changes):
    """A copy of a Hugging Face directory with other values in its config.json."""
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_transformers(transformers, tmp_path, family):
    theirs = random_model(transformers, family)
    theirs.save_pretrained(tmp_path / "hf")
    ours, tokenizer = load_causal_lm(tmp_path / "hf")
    assert tokenizer is None
    tokens = ids(150)
    expected = theirs(tokens).logits
    assert (ours(tokens) - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert ours.config.attention == ("local" if family == "mistral-sliding" else "dense")
    assert (ours.head.weight is ours.embedding.weight) == ("tied" in family or family == "qwen2")
    caches = ours.new_caches(2, 150)
    pieces = [
        ours.hidden_states(tokens[:, a:b], caches=caches) for a, b in [(0, 100), (100, 101), (101, 150)]
    ]
    torch.testing.assert_close(ours.head(torch.cat(pieces, 1)), expected, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_shards_and_the_older_spelling_of_rope(transformers, tmp_path):
    theirs = random_model(transformers, "llama-3.1")
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    path = tmp_path / "hf" / "config.json"
    values = json.loads(path.read_text())
    scaling = values.pop("rope_parameters")
    values["rope_theta"] = scaling.pop("rope_theta")
    path.write_text(json.dumps({**values, "rope_scaling": scaling}))
    ours, _ = load_causal_lm(tmp_path / "hf")
    assert ours.config.rope_scaling == {key: LLAMA3[key] for key in ours.config.rope_scaling}
    torch.testing.assert_close(ours(ids(100)), theirs(ids(100)).logits, rtol=1e-4, atol=1e-5)
    next((tmp_path / "hf").glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(UserError, match="00002-of"):
        load_causal_lm(tmp_path / "hf")


def test_dtype_and_own_checkpoints(llama, tmp_path):
    half, _ = load_causal_lm(llama, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.manual_seed(0)
    model = DualRoutingTransformer(ModelConfig(vocab_size=50, dim=16, num_layers=1, num_heads=2))
    (tmp_path / "tokenizer").write_bytes(b"pieces")
    save_model(model, tmp_path / "own", tmp_path / "tokenizer", {})
    loaded, tokenizer = load_causal_lm(tmp_path / "own")
    assert tokenizer.read_bytes() == b"pieces"
    torch.testing.assert_close(loaded(ids(20, vocab=50)), model(ids(20, vocab=50)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "bert"}, "a bert cannot be read: its learned positions.*model.causal false"),
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported: llama, mistral"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "llama3 lacks low_freq_factor"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_size": None}, "'hidden_size' is None"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 3}, "lacks the tensor model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "no place for, model.layers.1."),
        ({"intermediate_size": 40}, r"ffn.gate.weight has shape \(48, 32\)"),
        ({"model_type": "qwen2"}, "lacks the tensor model.layers.0.self_attn.q_proj.bias"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
         "only 1 of 2 layers"),
    ],
)  # fmt: skip
def test_what_does_not_map_is_refused_by_name(llama, tmp_path, changes, named):
    with pytest.raises(UserError, match=named) as caught:
        load_causal_lm(edited(llama, tmp_path / "hf", **changes))
    assert "\n" not in str(caught.value)


def test_folders_without_usable_weights(llama, tmp_path):
    folder = edited(llama, tmp_path / "hf")
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        load_causal_lm(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model.safetensors nor"):
        load_causal_lm(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        load_causal_lm(folder)
    for nothing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=str(nothing)):
            load_causal_lm(nothing)


def test_a_tensor_of_no_use_is_named(llama, tmp_path):
    folder = edited(llama, tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.rotary_emb.inv_freq"] = torch.zeros(4)  # in old checkpoints: passed over
    save_file(weights, folder / "model.safetensors")
    load_causal_lm(folder)
    weights["model.layers.0.self_attn.q_proj.lora_A"] = torch.zeros(4)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match="lora_A"):
        load_causal_lm(folder)


@torch.no_grad()
def test_gpt2_is_a_teacher_and_no_initial_weights(transformers, tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "hf")
    teacher, _ = load_causal_lm(tmp_path / "hf")
    tokens = ids(40, vocab=61)
    logits = teacher.hidden_states(tokens) @ teacher.head.weight.T
    expected = theirs(tokens).logits
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))

    first, second = ids(19, 1, 61), ids(30, 1, 61)
    packed = torch.cat([first, second, torch.zeros(1, 5, dtype=torch.long)], 1)
    segments = torch.tensor([[1] * 19 + [2] * 30 + [0] * 5])
    hidden = teacher.hidden_states(packed, segment_ids=segments)
    torch.testing.assert_close(hidden[:, :19], teacher.hidden_states(first), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden[:, 19:49], teacher.hidden_states(second), rtol=1e-4, atol=1e-5)
    assert hidden.isfinite().all()
    with pytest.raises(UserError, match="65 tokens is longer than the teacher's 64"):
        teacher.hidden_states(ids(65, vocab=61))
    with pytest.raises(UserError, match="GPT-2, which cannot become initial weights"):
        load_dense(tmp_path / "hf")


def test_gpt2_without_transformers(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[export\]'"):
        load_causal_lm(tmp_path)


# ------------------------------------------------------------------ llama2.c


def literal_llama2c(data, tokens):
    """run.c's forward, one token after the other, in float64: (n, V) logits."""
    dim, hidden, layers, heads, kv_heads, vocab, _ = torch.frombuffer(
        data, dtype=torch.int32, count=7
    ).tolist()
    floats = torch.frombuffer(data, dtype=torch.float32, offset=28).double()
    place = 0

    def take(*shape):
        nonlocal place
        place += math.prod(shape)
        return floats[place - math.prod(shape) : place].view(shape)

    head = dim // heads
    embedding, norm1 = take(vocab, dim), take(layers, dim)
    wq, wk, wv = (
        take(layers, dim, dim),
        take(layers, kv_heads * head, dim),
        take(layers, kv_heads * head, dim),
    )
    wo, norm2 = take(layers, dim, dim), take(layers, dim)
    w1, w2, w3 = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    final = take(dim)

    def normalised(x, weight):
        return weight * x / (x.square().mean() + 1e-5).sqrt()

    def turned(vector, position):
        out = vector.clone()
        for i in range(0, len(vector), 2):
            angle = position / 10000 ** ((i % head) / head)
            a, b = float(vector[i]), float(vector[i + 1])
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return out

    keys, values, logits = [[] for _ in range(layers)], [[] for _ in range(layers)], []
    for position, token in enumerate(tokens):
        x = embedding[token].clone()
        for layer in range(layers):
            y = normalised(x, norm1[layer])
            query = turned(wq[layer] @ y, position).view(heads, head)
            keys[layer].append(turned(wk[layer] @ y, position).view(kv_heads, head))
            values[layer].append((wv[layer] @ y).view(kv_heads, head))
            mixed = []
            for number in range(heads):
                shared = number // (heads // kv_heads)
                past = torch.stack([key[shared] for key in keys[layer]])
                weights = (past @ query[number] / math.sqrt(head)).softmax(0)
                mixed.append(weights @ torch.stack([value[shared] for value in values[layer]]))
            x = x + wo[layer] @ torch.cat(mixed)
            y = normalised(x, norm2[layer])
            x = x + w2[layer] @ (torch.nn.functional.silu(w1[layer] @ y) * (w3[layer] @ y))
        logits.append(embedding @ normalised(x, final))
    return torch.stack(logits)


@torch.no_grad()
def test_llama2c_is_what_run_c_computes(real_data):
    path = real_data / "tiny_lms/stories260K.bin"
    model, tokenizer = load_causal_lm(path)
    assert tokenizer is None
    assert model.num_parameters() == 260_032
    tokens = [1, 403, 407, 261, 378, 432, 417, 317, 369, 266, 420, 417]
    expected = literal_llama2c(bytearray(path.read_bytes()), tokens)
    torch.testing.assert_close(model(torch.tensor([tokens]))[0].double(), expected, rtol=0, atol=1e-4)
    assert float(expected.abs().max()) > 5


def test_files_that_are_no_llama2c_checkpoints(real_data, tmp_path):
    data = (real_data / "tiny_lms/stories260K.bin").read_bytes()
    for content, named in [
        (data[:-4], "1,056,536 bytes, its header"),
        (data[:20], "20 bytes"),
        (b"24ka" + data[4:], "version"),
        (b"\xff" * len(data), "does not begin as"),
    ]:
        (tmp_path / "model.bin").write_bytes(content)
        with pytest.raises(UserError, match=named):
            load_causal_lm(tmp_path / "model.bin")
    (tmp_path / "model.pt").write_bytes(data)
    with pytest.raises(UserError, match="is no model"):
        load_causal_lm(tmp_path / "model.pt")
