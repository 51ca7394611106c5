"""Quantised checkpoints: what torchao chose is what is stored, read back and multiplied with."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from dualroute.attention.backend import plain_torch, token_kernels
from dualroute.attention.backends import cpp as cpu_kernels
from dualroute.cli import main
from dualroute.compress import quantize as module
from dualroute.compress.quantize import QuantizeConfig, check_possible, quantize, quantize_model
from dualroute.data.manifest import Manifest
from dualroute.errors import UserError
from dualroute.evaluate.load import load
from dualroute.evaluate.perplexity import EvaluateConfig, evaluate
from dualroute.model import DualRoutingTransformer, ModelConfig, SamplingConfig, generate, quantized
from dualroute.model.checkpoint.format import WEIGHTS, find_checkpoint, load_model, save_model
from dualroute.model.ends_config import FrontendConfig, TaskHeadConfig
from dualroute.model.quantized import (
    Quantization,
    QuantizedLinear,
    QuantizedTable,
    integer_product,
    pack_int4,
    stored_tensors,
    unpack_int4,
)
from tests.sealed import rewrite

ANYWHERE = ["int8_weight_only", "int8_dynamic", "int4_weight_only"]
SHAPE = ModelConfig(
    dim=64, num_layers=2, num_heads=4, ffn_dim=128, window=8, block=16, top_k=1, max_context=128
)


@pytest.fixture(scope="module")
def source(tiny_dataset, tmp_path_factory):
    """A checkpoint of an untrained model for the tiny data set."""
    manifest = Manifest.load(tiny_dataset)
    torch.manual_seed(0)
    model = DualRoutingTransformer(dataclasses.replace(SHAPE, vocab_size=manifest.tokenizer.vocab_size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    folder = tmp_path_factory.mktemp("float") / "model"
    save_model(model, folder, tiny_dataset / manifest.tokenizer.file, {"step": 7, "context": 64})
    return folder


def float_model(tie=True):
    torch.manual_seed(1)
    config = dataclasses.replace(SHAPE, vocab_size=50, tie_embeddings=tie)
    return DualRoutingTransformer(config).eval()


@pytest.mark.parametrize("scheme", ANYWHERE)
def test_a_quantized_checkpoint_is_read_back_bit_for_bit_and_used_like_any_other(
    source, tiny_dataset, tmp_path, scheme
):
    written = quantize(QuantizeConfig(str(source), str(tmp_path / "small"), scheme, device="cpu"))
    in_memory = quantize_model(
        load_model(find_checkpoint(source)), QuantizeConfig("c", "o", scheme).quantization
    )
    read = load_model(written)
    ours, theirs = stored_tensors(in_memory), stored_tensors(read)
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours
    )
    ids = torch.randint(300, (2, 40))
    assert torch.equal(in_memory.eval()(ids), read(ids))
    assert written.step == 7
    size, before = ((folder / WEIGHTS).stat().st_size for folder in (written.folder, source))
    assert size * (5 if scheme == "int4_weight_only" else 3.3) < before  # one head shorter than real models

    loaded = load(written.folder, "cpu")
    tokens = list(generate(loaded.model, [1, 2, 3], SamplingConfig(max_new_tokens=5)))
    assert len(tokens) == 5
    losses = [
        evaluate(EvaluateConfig(str(folder), data=str(tiny_dataset), device="cpu", dtype="float32")).loss
        for folder in (source, written.folder)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    rounded = (load_model(find_checkpoint(source)).eval()(ids) - read(ids)).abs().max()
    assert rounded > 1e-4  # a weight is rounded by 1/254 of its row's largest


def test_the_integers_are_those_of_torchao():
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, PerRow, quantize_

    for config, quantization in (
        (
            Int8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False),
            Quantization("int8_weight_only"),
        ),
        (
            IntxWeightOnlyConfig(torch.int4, PerGroup(32), scale_dtype=torch.bfloat16),
            Quantization("int4_weight_only", 32),
        ),
    ):
        theirs, ours = float_model(), quantize_model(float_model(), quantization)
        quantize_(theirs, config)
        for name, mine in ours.named_modules():
            if isinstance(mine, QuantizedLinear):
                weight = theirs.get_submodule(name).weight
                assert torch.equal(mine.dequantized(torch.float32), weight.dequantize().float())
                rows = torch.randn(3, mine.in_features)
                torch.testing.assert_close(mine(rows), F.linear(rows, weight), rtol=1e-5, atol=1e-5)


def test_dynamic_int8_rounds_activations_as_torchao_does():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    theirs = float_model()
    quantize_(theirs, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    ours = quantize_model(float_model(), Quantization("int8_dynamic"))
    rows = torch.randn(2, 3, 64)
    for name in ("layers.0.ffn.gate", "layers.1.attention.out_proj"):
        expected, found = theirs.get_submodule(name)(rows), ours.get_submodule(name)(rows)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(found, theirs.get_submodule(name).weight.dequantize().matmul(rows[0, 0])[None])


def test_integer_products_are_exact():
    rows, weight = (torch.randint(-128, 128, (size, 512), dtype=torch.int8) for size in (5, 7))
    assert torch.equal(integer_product(rows, weight), (rows.long() @ weight.long().t()).float())


def test_packing_keeps_every_int4():
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    packed = pack_int4(values)
    assert packed.shape == (3, 16)
    assert torch.equal(unpack_int4(packed), values)


def test_the_int4_kernel_of_the_cpu_gives_the_same_product():
    model = quantize_model(float_model(), Quantization("int4_weight_only", 32))
    linear = model.layers[0].ffn.down
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        rows = torch.randn(2, 5, 128, dtype=dtype)
        linear.packed = None
        expected = linear(rows)
        linear.pack_for_cpu()
        assert linear.packed is not None
        torch.testing.assert_close(linear(rows), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["layers.0.ffn.down", "head"])
@pytest.mark.skipif(token_kernels(torch.ones(1)) is None, reason="no C++ compiler")
def test_the_int8_kernel_of_the_cpu_takes_one_row(name, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "fast_int8_product", lambda: True)
    projection = quantize_model(float_model(), Quantization("int8_weight_only")).get_submodule(name)
    inner = getattr(projection, "in_features", 64)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float64, 1e-12)):
        for shape in ((1, inner), (1, 1, inner), (inner,), (3, inner)):
            rows = torch.randn(shape, dtype=dtype)
            projection.packed = None
            expected = projection(rows)
            projection.pack_for_cpu()
            assert projection.packed is not None
            torch.testing.assert_close(projection(rows), expected, rtol=tolerance, atol=tolerance)
    monkeypatch.setattr(quantized, "int8_product", lambda row, panels, columns: torch.zeros(1, columns))
    assert not projection(torch.randn(1, inner)).any()
    assert projection(torch.randn(2, inner)).any()


def test_without_fast_kernels_int8_is_torchs_own(monkeypatch):
    linear = quantize_model(float_model(), Quantization("int8_weight_only")).layers[0].ffn.down
    with plain_torch():
        linear.pack_for_cpu()
    assert linear.packed is None
    monkeypatch.setattr(cpu_kernels, "fast_int8_product", lambda: False)
    linear.pack_for_cpu()
    assert linear.packed is None


@pytest.mark.parametrize("tie", [True, False])
def test_one_table_serves_look_up_and_head_where_they_are_tied(tie):
    model = quantize_model(float_model(tie), Quantization("int8_weight_only"))
    assert isinstance(model.embedding, QuantizedTable)
    assert (model.head.table is model.embedding) == tie
    assert ("head.table.qdata" in stored_tensors(model)) != tie
    ids, hidden = torch.tensor([[3, 4]]), torch.randn(2, 64)
    table = model.head.table.dequantized(torch.float32)
    assert torch.equal(model.embedding(ids)[0], model.embedding.dequantized(torch.float32)[3:5])
    torch.testing.assert_close(model.head(hidden), hidden @ table.t())
    torch.testing.assert_close(model.head(hidden, lambda h, w: F.linear(h, w)), hidden @ table.t())
    assert model.embedding.scale.shape == (50, 1)


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("tie", [True, False])
def test_embeddings_may_stay_as_they_are(source, tmp_path, embeddings, tie):
    quantization = Quantization("int8_weight_only", embeddings=embeddings)
    model = quantize_model(float_model(tie), quantization)
    written = module.save_quantized(model, quantization, find_checkpoint(source), tmp_path / "small")
    ids = torch.randint(50, (1, 20))
    assert torch.equal(load_model(written)(ids), model(ids))


def test_tensors_of_torchao_are_stored_too(source, tmp_path, monkeypatch):
    """The layout that GPU schemes are stored in, tried with a torchao tensor that a CPU can make."""
    monkeypatch.setattr(module, "torchao_config", lambda quantization: module.rows_config())
    quantization = Quantization("float8_dynamic")
    model = quantize_model(load_model(find_checkpoint(source)), quantization).eval()
    written = module.save_quantized(model, quantization, find_checkpoint(source), tmp_path / "small")
    read = load_model(written)
    assert type(read.layers[0].ffn.gate.weight).__name__ == "Int8Tensor"
    ids = torch.randint(300, (1, 20))
    model.to(torch.bfloat16), read.to(torch.bfloat16)
    assert torch.equal(read(ids), model(ids))


@pytest.mark.parametrize("scheme", ["int4_tile_packed", "float8_dynamic"])
def test_what_a_device_cannot_do_is_refused_by_name(source, tmp_path, capsys, scheme):
    arguments = [
        "--checkpoint",
        source,
        "--output",
        tmp_path / "small",
        "--scheme",
        scheme,
        "--device",
        "cpu",
    ]
    assert main(["quantize", *map(str, arguments)]) == 2
    line = capsys.readouterr().err
    assert scheme in line
    assert "CUDA" in line
    assert not (tmp_path / "small").exists()


def test_an_old_gpu_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_possible("int4_tile_packed", torch.device("cuda"))
    with pytest.raises(UserError, match=r"float8_dynamic needs compute capability 8\.9"):
        check_possible("float8_dynamic", torch.device("cuda"))


def test_a_width_that_the_group_does_not_divide_is_named():
    torch.manual_seed(0)
    model = DualRoutingTransformer(dataclasses.replace(SHAPE, vocab_size=50, ffn_dim=96))
    with pytest.raises(UserError, match=r"layers\.0\.ffn\.down has 96 columns.*use --group_size 32"):
        quantize_model(model, Quantization("int4_weight_only", 64))


def test_other_refusals(source, tiny_dataset, tmp_path, capsys, monkeypatch):
    def refused(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err.strip()

    small = tmp_path / "small"
    quantize(QuantizeConfig(str(source), str(small), device="cpu"))
    capsys.readouterr()
    again = refused("quantize", "--checkpoint", small, "--output", tmp_path / "again")
    assert "is quantized (int8_weight_only)" in again
    assert "exists already" in refused("quantize", "--checkpoint", source, "--output", small)
    assert "kernels have" in refused(
        "quantize",
        "--checkpoint",
        source,
        "--output",
        "x",
        "--scheme",
        "int4_weight_only",
        "--group_size",
        48,
    )
    training = refused(
        "pretrain", "--init_from", small, "--data.path", tiny_dataset, "--output", tmp_path / "run",
        "--data.context", 64, "--train.max_steps", 60, "--train.tokens_per_batch", 512,
    )  # fmt: skip
    assert "integers cannot be trained" in training
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = refused("quantize", "--checkpoint", source, "--output", tmp_path / "b")
    assert "pip install -e '.[compress]'" in line


def test_a_file_that_does_not_fit_its_description_is_refused(source, tmp_path):
    written = quantize(QuantizeConfig(str(source), str(tmp_path / "small"), device="cpu"))
    said = json.loads((written.folder / "checkpoint.json").read_text())
    said["quantization"]["scheme"], said["quantization"]["group_size"] = "int4_weight_only", 32
    rewrite(written.folder, quantization=said["quantization"])
    with pytest.raises(UserError, match=r"does not fit its model\.json and scheme int4_weight_only"):
        load(written.folder, "cpu")


PATCHES = FrontendConfig("patches", 9, [4, 4], [2, 2], learned_places=True)
FRAMES = FrontendConfig("frames", 24)
ENCODER = {"causal": False, "block": 4, "sub_block": 2}
BIASED = {
    "qkv_bias": {"qkv_bias": True},
    "texts": {"task_head": TaskHeadConfig("sequence", ["a", "b", "c"]), "tie_embeddings": False},
    "images": {**ENCODER, "frontend": PATCHES, "task_head": TaskHeadConfig("sequence", ["a", "b"], "mean")},
    "recognition": {**ENCODER, "frontend": FRAMES, "task_head": TaskHeadConfig("ctc", ["", "a", "b"])},
    "items": {"task_head": TaskHeadConfig("item", [str(number) for number in range(299)])},
}


@pytest.mark.parametrize("scheme", ANYWHERE)
@pytest.mark.parametrize("kind", BIASED)
def test_biases_frontends_and_heads_of_tasks_come_through_the_file(kind, scheme, tiny_dataset, tmp_path):
    """Weights are rounded; biases, and what enters instead of tokens, are not touched."""
    torch.manual_seed(0)
    model = DualRoutingTransformer(dataclasses.replace(SHAPE, vocab_size=300, **BIASED[kind])).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    source = save_model(model, tmp_path / "float", tiny_dataset / "tokenizer.model", {})
    written = quantize(QuantizeConfig(str(source.folder), str(tmp_path / "small"), scheme, device="cpu"))
    read = load_model(written)
    biases = {name: value for name, value in model.named_parameters() if name.endswith("bias")}
    assert biases
    assert all(torch.equal(read.state_dict()[name], value) for name, value in biases.items())
    if model.config.frontend is not None:
        ours, theirs = model.embedding.state_dict(), read.embedding.state_dict()
        assert all(torch.equal(theirs[name], value) for name, value in ours.items())
        inputs = torch.randn(2, 16, model.config.frontend.features)
    else:
        inputs = torch.randint(300, (2, 16))
    with torch.no_grad():
        exact, rounded = model(inputs), read(inputs)
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < (0.2 if scheme == "int4_weight_only" else 0.03)
    assert len([name for name in stored_tensors(read) if name.startswith("head.")]) == 0
