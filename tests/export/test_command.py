"""`dualroute export`: the whole way, and every refusal before anything is written."""

import json
import re

import pytest
import torch

from dualroute.cli import main
from dualroute.errors import UserError
from dualroute.evaluate.load import load
from dualroute.export.command import ExportConfig, prepare
from dualroute.export.quality import measure, samples, windows
from dualroute.model.checkpoint.format import save_model
from tests.export.conftest import tiny_model


@pytest.mark.slow
def test_a_folder_for_transformers(checkpoint, tiny_dataset, tmp_path, capsys):
    """Loaded and compared by the command in a process that cannot import dualroute."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    source, output = checkpoint().folder, tmp_path / "mine"
    arguments = ["--checkpoint", source, "--format", "hf", "--output", output, "--license", "cc0-1.0"]
    assert main(["export", *map(str, arguments), "--data", str(tiny_dataset), "--context", "64"]) == 0
    figures = json.loads((output / "export.json").read_text())
    parity = figures["parity"]
    assert set(parity["logits"].values()) == {0.0}
    assert max(map(int, parity["logits"])) > 8 * (2 + 2)  # routed
    assert parity["generation"] == {"alone": True, "padded_batch": True}
    assert parity["texts"] > 300
    assert figures["checkpoint"]["step"] == 7
    assert "files" not in figures["checkpoint"]
    assert figures["bytes"]["model.safetensors"] == (output / "model.safetensors").stat().st_size

    card = (output / "README.md").read_text()
    assert "| trained on | 1,234 tokens in all (see History) |" in card
    assert "1. pretrain: c (1,234 tokens in 7 steps; context 64; validation loss 3.5000)" in card
    assert "license: cc0-1.0" in card.split("---")[1]
    quality = figures["quality"]
    assert quality["tokens"] > 100
    for shown in (f"{quality['loss']:.4f}", f"{quality['bits_per_byte']:.4f}", "1,234 tokens"):
        assert shown in card
    assert str(tmp_path) not in card + (output / "export.json").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    capsys.readouterr()
    exec(snippet.replace("path/to/this/folder", str(output)), {})
    assert "Once upon a time" in capsys.readouterr().out


def refused(message, **options):
    with pytest.raises(UserError, match=message):
        prepare(ExportConfig(**options))


def test_what_cannot_be_exported(checkpoint, tmp_path, monkeypatch):
    source = checkpoint().folder
    options = {"checkpoint": str(source), "format": "hf", "output": str(tmp_path / "out")}
    (tmp_path / "there").mkdir()
    refused("there exists already", **{**options, "output": str(tmp_path / "there")})
    refused("no checkpoint at", **{**options, "checkpoint": str(tmp_path / "none")})
    refused("quantize works with --format onnx only", **options, quantize=True)
    refused("dtype bfloat16 works with --format hf only", **{**options, "format": "onnx"}, dtype="bfloat16")
    refused("dtype float16 works with --format gguf only, not hf", **options, dtype="float16")
    refused("layout works with --format hf only", **{**options, "format": "onnx"}, layout="own")
    refused(
        "dtype bfloat16 contradicts quantize",
        **{**options, "format": "gguf"},
        dtype="bfloat16",
        quantize=True,
    )
    refused("--data .* or --text", **options, data="a", text="b")
    refused("opset is 9", **options, opset=9)
    refused("max_tokens is 0", **options, max_tokens=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(r"--format hf needs transformers: pip install -e '.\[export\]'", **options)
    refused(r"--format gguf needs gguf: pip install -e '.\[gguf\]'", **{**options, "format": "gguf"})


def test_quantised_weights_are_refused(tiny_dataset, tmp_path):
    model, tokenizer = tiny_model(), tiny_dataset / "tokenizer.model"
    save_model(model, tmp_path / "named", tokenizer, {"quantization": {"scheme": "int8"}})
    options = {"format": "onnx", "output": str(tmp_path / "out")}
    refused(
        r"quantised weights \(int8\).*--format onnx --quantize", checkpoint=str(tmp_path / "named"), **options
    )
    save_model(model.to(torch.float16), tmp_path / "half", tokenizer, {})
    refused(r"quantised weights \(F16\)", checkpoint=str(tmp_path / "half"), **options)


def test_nothing_is_left_behind_by_a_failure(checkpoint, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from dualroute.export.hf import folder as huggingface

    answer = {"logits": {"5": 0.25}, "texts": 1, "texts_differing": [], "generation": {"alone": True}}
    monkeypatch.setattr(huggingface, "run_check", lambda folder, expected: answer)
    output = tmp_path / "out"
    arguments = ["export", "--checkpoint", checkpoint().folder, "--format", "hf", "--output", output]
    assert main([str(a) for a in arguments]) == 2
    assert "logits are off by {'5': 0.25}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_the_checkpoints_own_loss_is_used_without_data(checkpoint):
    config = ExportConfig(str(checkpoint().folder), "hf", "out")
    made = load(config.checkpoint, "cpu")
    quality = measure(config, made)
    assert quality["loss"] == 3.5 == made.checkpoint.metadata["val_loss"]
    assert "bits_per_byte" not in quality
    assert samples(config, made) == windows(config, made) == []


def test_real_text_comes_from_the_shards(checkpoint, tiny_dataset):
    config = ExportConfig(str(checkpoint().folder), "onnx", "out", data=str(tiny_dataset), context=50)
    made = load(config.checkpoint, "cpu")
    texts = samples(config, made)
    assert len(texts) > 3
    assert {"river", "house", "green"} <= set(" ".join(texts).split())
    batches = windows(config, made)
    assert {batch["input_ids"].shape[0] for batch in batches} == {1}
    assert torch.equal(batches[0]["input_ids"][0, 1:], batches[0]["labels"][0, :-1])
