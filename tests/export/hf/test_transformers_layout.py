"""A dense model is exported as a class that transformers has: the same logits, and no code of ours in it."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from dualroute.errors import UserError  # noqa: E402
from dualroute.export.hf import folder as huggingface  # noqa: E402
from dualroute.export.hf.transformers_layout import why_not  # noqa: E402
from dualroute.model import ModelConfig  # noqa: E402
from dualroute.model.foreign.hub import load_causal_lm  # noqa: E402
from tests.export.conftest import KINDS, TINY  # noqa: E402

DENSE = {"attention": "dense"}
LAYOUTS = {
    "plain": ("Llama", DENSE),
    "grouped": ("Llama", {**DENSE, "num_heads": 8, "num_kv_heads": 2, "rope_theta": 500.0}),
    "untied": ("Llama", {**DENSE, "tie_embeddings": False, "head_dim": 6, "norm_eps": 1e-3}),
    "linear": ("Llama", {**DENSE, "rope_scaling": {"factor": 4.0}}),
    "llama3": ("Llama", {**DENSE, **KINDS["llama3"]}),
    "bias": ("Qwen2", {**DENSE, "qkv_bias": True}),
    "norms": ("Qwen3", {**DENSE, "qk_norm": True, "norm_eps": 1e-6, "num_kv_heads": 2, "head_dim": 12}),
    "window": ("Mistral", {"attention": "local"}),
    "windows": ("Mistral", {"attention": "local", "layer_windows": [20, 20]}),
}


def ids_of(length, batch=2):
    return torch.randint(4, 320, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", LAYOUTS)
@torch.no_grad()
def test_logits_are_those_of_the_model(kind, loaded, tmp_path):
    name, options = LAYOUTS[kind]
    made = loaded(**options)
    folder = tmp_path / "hf"
    folder.mkdir()
    written = huggingface.write(made, folder, "auto")
    assert written["class"] == f"{name}ForCausalLM"
    assert written["source_files"] == []
    assert not list(folder.glob("*.py"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model) is getattr(transformers, f"{name}ForCausalLM")
    for length in (1, 9, 170):
        wanted = made.model(ids_of(length))
        scale = max(1.0, float(wanted.abs().max()))
        assert (model(ids_of(length)).logits - wanted).abs().max() <= huggingface.OTHERS_TOLERANCE * scale

    back, _ = load_causal_lm(folder)
    ours, again = dict(made.model.named_parameters()), dict(back.named_parameters())
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[weight], again[weight]) for weight in ours)
    for field in (
        "attention",
        "rope_theta",
        "rope_scaling",
        "qkv_bias",
        "qk_norm",
        "norm_eps",
        "max_context",
    ):
        assert getattr(back.config, field) == getattr(made.model.config, field)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "its attention is dual"),
        ({"attention": "interleaved", "dense_every": 2}, "its attention is interleaved"),
        ({**DENSE, "gate": True}, "its heads have gates"),
        ({**DENSE, "qkv_bias": True, "qk_norm": True}, "both qkv_bias and qk_norm"),
        ({**DENSE, "qk_norm": True}, "epsilon 1e-06 and the others 1e-05"),
        ({**DENSE, "global_rotary_factor": 0.0}, "RoPE turns none of its heads (global_rotary_factor 0)"),
        ({"attention": "local", "local_rotary_factor": 0.5}, "RoPE turns a part of its heads (local_rotary"),
        ({"attention": "local", "qk_norm": True}, "a Mistral has a sliding window"),
        ({"attention": "dense", "layer_ffn_dims": [64, 32]}, "layers have feed-forward widths of their own"),
        ({"attention": "local", "layer_windows": [3, 4]}, "layers have windows of their own"),
    ],
)
def test_what_no_class_computes(options, said, loaded, tmp_path):
    assert said in why_not(ModelConfig(**{**TINY, **options}))
    made = loaded(**options)
    assert huggingface.write(made, tmp_path, "auto")["class"] == "DualRoutingForCausalLM"
    with pytest.raises(UserError, match="--layout transformers: no class of transformers") as caught:
        huggingface.write(made, tmp_path, "transformers")
    assert said in str(caught.value)


@pytest.mark.slow
def test_the_folder_is_checked_without_remote_code(loaded, tmp_path):
    made = loaded(dtype="bfloat16", **DENSE, num_kv_heads=2)
    folder = tmp_path / "hf"
    folder.mkdir()
    huggingface.write(made, folder, "transformers")
    found = huggingface.verify(made, folder, [])
    assert found["class"] == "LlamaForCausalLM"
    assert found["generation"] == {"alone": True, "padded_batch": True}
    generate = transformers.pipeline("text-generation", model=str(folder))
    assert generate("the river", max_new_tokens=3)[0]["generated_text"].startswith("the river")
