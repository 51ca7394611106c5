"""The masked form is the model, for every kind of it, at every length; also once recorded, and as ONNX."""

import json

import pytest
import torch

from dualroute.cli import main
from dualroute.errors import UserError
from dualroute.export import parity
from dualroute.export.masked import MaskedTransformer
from dualroute.export.torch_program import compare
from tests.export.conftest import KINDS, TINY, tiny_model

LENGTHS = (1, 3, 8, 9, 33, 61, 160)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "similar_keys"])
@pytest.mark.parametrize("for_onnx", [False, True])
@torch.no_grad()
def test_the_same_numbers_in_float64(kind, for_onnx):
    """Where two blocks never score alike to the last digit."""
    model = tiny_model(**KINDS[kind]).double()
    masked = MaskedTransformer(model, for_onnx)
    for length in LENGTHS:
        ids = parity.trial_ids(model.config, length)
        torch.testing.assert_close(masked(ids), model(ids), rtol=0, atol=1e-11)


@torch.no_grad()
def test_auto_opens_the_mask_of_short_texts():
    auto, full, routed = (
        tiny_model(global_mode=mode, auto_break_even=64).double() for mode in ("auto", "full", "routed")
    )
    masked = MaskedTransformer(auto)
    for length, same in ((64, full), (65, routed)):
        ids = parity.trial_ids(auto.config, length)
        torch.testing.assert_close(masked(ids), same(ids), rtol=0, atol=1e-11)
        other = routed if same is full else full
        assert (masked(ids) - other(ids)).abs().max() > 1e-3


@torch.no_grad()
def test_of_equal_scores_the_first_is_chosen():
    """As by the router: queries of 0 score every block alike."""
    model = tiny_model(num_layers=1, attention="dual").double()
    attention = model.layers[0].attention
    attention.global_qkv.weight[: attention.global_heads * attention.head_dim] = 0
    ids = parity.trial_ids(model.config, 90)
    torch.testing.assert_close(MaskedTransformer(model)(ids), model(ids), rtol=0, atol=1e-11)


def test_a_difference_is_refused():
    model = tiny_model()
    with pytest.raises(
        UserError, match=r"the file's logits differ from the model's.*'largest': .*not published"
    ):
        compare(model, lambda ids: model(ids) + 1e-3 * (torch.arange(ids.shape[1]) > 5)[:, None], "file")
    found = compare(model, lambda ids: model(ids) + 1e-5, "file")
    assert {each["beyond"] for each in found["logits"].values()} == {0.0}
    assert all(5e-6 < each["largest"] < 5e-5 for each in found["logits"].values())


def test_the_lengths_reach_routing():
    for options in (TINY, {**TINY, "global_mode": "auto", "max_context": 9000}):
        model = tiny_model(**options)
        limits = {layer.attention.max_exact_blocks for layer in model.layers}
        assert parity.lengths(model.config)[-1] > max(limits) * model.config.block
        assert parity.lengths(model.config)[0] == 1


@pytest.mark.slow
def test_a_program_for_torch(checkpoint, tmp_path):
    options = {"num_layers": 1, "num_kv_heads": 2, "gate": True, "global_rotary_factor": 0.5}
    source = checkpoint(**options).folder
    output = tmp_path / "out"
    arguments = ["--checkpoint", source, "--format", "torch-export", "--output", output]
    assert main(["export", *map(str, arguments)]) == 0
    figures = json.loads((output / "export.json").read_text())["parity"]["logits"]
    assert max(each["largest"] for each in figures.values()) <= 1e-4
    assert {path.name for path in output.iterdir()} == {
        "model.pt2", "config.json", "tokenizer.model", "export.json",
    }  # fmt: skip
    program = torch.export.load(output / "model.pt2").module()
    model = tiny_model(**options)
    with torch.no_grad():
        for length in LENGTHS:
            for batch in (1, 3):
                ids = parity.trial_ids(model.config, length, batch)
                torch.testing.assert_close(program(ids), model(ids), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_file_for_onnxruntime(checkpoint, tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    text = tmp_path / "text.txt"
    text.write_text("The old river sees a green hill.\n" * 60)
    options = {"num_layers": 1, "global_mode": "auto", "qk_norm": True, "num_kv_heads": 2}
    options["global_rotary_factor"] = 0.0
    output = tmp_path / "out"
    arguments = ["--checkpoint", checkpoint(**options).folder, "--format", "onnx", "--output", output]
    arguments += ["--text", text, "--context", "64", "--quantize", "true"]
    assert main(["export", *map(str, arguments)]) == 0
    figures = json.loads((output / "export.json").read_text())
    assert max(each["largest"] for each in figures["parity"]["logits"].values()) <= 1e-4

    file = onnx.load(output / "model.onnx")
    onnx.checker.check_model(file)
    shapes = [[size.dim_param for size in value.type.tensor_type.shape.dim] for value in file.graph.input]
    assert shapes == [["batch", "length"]]
    run = runtime.InferenceSession(output / "model.onnx", providers=["CPUExecutionProvider"])
    ids = torch.randint(4, 320, (3, 70))
    logits = torch.from_numpy(run.run(["logits"], {"input_ids": ids.numpy()})[0])
    with torch.no_grad():
        torch.testing.assert_close(logits, tiny_model(**options)(ids), rtol=0, atol=1e-4)

    int8 = figures["int8"]
    assert figures["bytes"]["model-int8.onnx"] < figures["bytes"]["model.onnx"]
    assert int8["tokens"] > 64
    assert abs(int8["loss"]["float32"] - figures["quality"]["loss"]) < 1e-3
    run = runtime.InferenceSession(output / "model-int8.onnx", providers=["CPUExecutionProvider"])
    rounded = torch.from_numpy(run.run(["logits"], {"input_ids": ids.numpy()})[0])
    assert 1e-5 < (rounded - logits).abs().max() < 0.5
    assert int8["loss"]["int8"] == pytest.approx(int8["loss"]["float32"], rel=0.1)


def test_blocks_of_similar_keys_are_refused_and_named():
    with pytest.raises(UserError, match="cluster_span 16: export it with --format hf"):
        MaskedTransformer(tiny_model(cluster_span=16))
