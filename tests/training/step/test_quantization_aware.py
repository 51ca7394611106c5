"""What is trained with rounded weights is what ``dualroute quantize`` then makes of them."""

import json

import pytest
import torch

from dualroute.cli import main
from dualroute.compress.quantize import QuantizeConfig, quantize, quantize_model
from dualroute.data.tokenizer import Tokenizer
from dualroute.evaluate.perplexity import EvaluateConfig, evaluate
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import save_model
from dualroute.model.quantized import Quantization
from dualroute.training.step.quantization_aware import round_weights_in_forward

SCHEMES = [Quantization("int8_weight_only"), Quantization("int4_weight_only", 32)]


def build(tie=True):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50, dim=64, num_layers=2, num_heads=4, ffn_dim=96, window=8, block=16, tie_embeddings=tie
    )
    return DualRoutingTransformer(config)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("quantization", SCHEMES, ids=lambda quantization: quantization.scheme)
def test_rounded_weights_are_the_quantized_ones_bit_for_bit(quantization, tie):
    rounded, quantized = build(tie), quantize_model(build(tie), quantization).eval()
    names = [name for name, _ in rounded.named_parameters()]
    round_weights_in_forward(rounded, quantization.scheme, 32)
    assert [name for name, _ in rounded.named_parameters()] == names
    for name in ("layers.0.attention.global_qkv", "layers.1.ffn.down"):
        ours, theirs = rounded.get_submodule(name), quantized.get_submodule(name)
        identity = torch.eye(ours.in_features)
        assert torch.equal(ours(identity), theirs.dequantized(torch.float32).t())
    ids = torch.randint(50, (2, 30))
    assert torch.equal(rounded.embedding(ids), quantized.embedding(ids))
    torch.testing.assert_close(rounded.eval()(ids), quantized(ids), rtol=1e-5, atol=1e-5)
    assert (rounded(ids) - build(tie)(ids)).abs().max() > 1e-4


def test_the_gradient_passes_as_if_nothing_were_rounded():
    model = build()
    round_weights_in_forward(model, "int4_weight_only", 32)
    linear = model.layers[0].ffn.gate
    rows = torch.randn(5, 64)
    linear(rows).sum().backward()
    torch.testing.assert_close(linear.weight.grad, rows.sum(0).expand(96, 64))
    model.zero_grad()
    model(torch.randint(50, (1, 9))).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_run_validates_what_quantize_makes(tiny_dataset, tmp_path, capsys):
    tokenizer = Tokenizer(tiny_dataset / "tokenizer.model")
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, dim=64, num_layers=1, num_heads=2, ffn_dim=128, block=16
    )
    model = DualRoutingTransformer(config)
    with torch.no_grad():  # sure of its wrong answers, so that rounding moves the loss far more than chance
        for parameter in model.parameters():
            parameter.mul_(5)
    save_model(model, tmp_path / "start", tokenizer.path, {"origin": "a test"})
    run = [
        "pretrain", "--data.path", tiny_dataset, "--output", tmp_path / "run", "--data.context", 64,
        "--init_from", tmp_path / "start", "--train.micro_batch", 2, "--train.tokens_per_batch", 256,
        "--train.max_steps", 2, "--optim.warmup_steps", 1, "--optim.lr", "1e-6",
        "--monitor.peak_tflops", "0.1", "--train.quantization_aware", "int4_weight_only",
    ]  # fmt: skip
    assert main([str(word) for word in run]) == 0
    small = quantize(
        QuantizeConfig(str(tmp_path / "run"), str(tmp_path / "small"), "int4_weight_only", device="cpu")
    )
    said = json.loads((small.folder / "checkpoint.json").read_text())
    losses = [
        evaluate(EvaluateConfig(str(folder), data=str(tiny_dataset), device="cpu")).loss
        for folder in (small.folder, tmp_path / "run")
    ]
    assert losses[0] == pytest.approx(said["val_loss"], abs=1e-4)
    assert abs(losses[1] - said["val_loss"]) > 0.01  # the float weights were never validated


def test_a_group_that_does_not_fit_is_named():
    with pytest.raises(
        Exception, match=r"quantization_group_size 64 does not divide the 96 columns of layers\.0\.ffn\.down"
    ):
        round_weights_in_forward(build(), "int4_weight_only", 64)
