"""What of the configuration counts beside ``init_from``: whatever was given, default or not."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path

import pytest
import torch

from dualroute.cli import parse_stage
from dualroute.errors import UserError
from dualroute.model import ModelConfig
from dualroute.model.checkpoint.format import Checkpoint, save_model
from dualroute.training.config import PretrainConfig
from dualroute.training.initial_model import build_model, build_sharded_model, with_given

INITIAL = ModelConfig(
    vocab_size=320, dim=32, num_layers=2, num_heads=4, window=4, top_k=3, far_summary="none", rope_theta=5e5
)


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_a_given_value_counts_although_it_is_the_default(stage: str, tmp_path: Path) -> None:
    """From a flag, a file, a file named in a file, and a table on the command line."""
    shape = tmp_path / "shape.yaml"
    shape.write_text("top_k: 8\n")
    outer = tmp_path / "outer.yaml"
    outer.write_text("model: shape.yaml\n")
    inline = tmp_path / "inline.yaml"
    inline.write_text("model: {far_summary: second_order}\n")
    for arguments, name in (
        (["--model.window", "128"], "window"),
        (["--model.window=128"], "window"),
        (["--config", str(outer)], "top_k"),
        (["--model", str(shape)], "top_k"),
        (["--config", str(inline)], "far_summary"),
        (["--model", '{"rope_theta": 10000.0}'], "rope_theta"),
    ):
        asked = parse_stage(stage, arguments).model
        assert asked.given == {name}, arguments
        found = with_given(INITIAL, asked, "init_from X")
        default = getattr(ModelConfig(), name)
        assert getattr(found, name) == default != getattr(INITIAL, name)
        others = {key: value for key, value in found.to_dict().items() if key != name}
        assert others == {key: value for key, value in INITIAL.to_dict().items() if key != name}


def test_in_python_what_is_passed_is_given() -> None:
    asked = ModelConfig(window=128)
    assert asked.given == {"window"}
    assert ModelConfig(320, 32).given == {"vocab_size", "dim"}
    for copied in (copy.deepcopy(asked), pickle.loads(pickle.dumps(asked))):
        assert copied.given == {"window"}
    assert with_given(INITIAL, asked, "X").window == 128
    assert with_given(INITIAL, ModelConfig(), "X") == INITIAL


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"dim": 256}, "model.dim is 256 and the weights of init_from X have 32"),
        ({"num_heads": 8}, "model.num_heads is 8 and the weights of init_from X have 4"),
        ({"num_kv_heads": 2}, "model.num_kv_heads is 2 and the weights of init_from X have 4"),
        ({"local_heads": 3, "global_heads": 1, "num_heads": 4}, "model.global_heads is 1"),
        ({"attention": "dense"}, "dualroute convert makes a model of another attention"),
        ({"tie_embeddings": False}, "model.tie_embeddings is False"),
        ({"vocab_size": 400}, "model.vocab_size is 400"),
    ],
)
def test_what_contradicts_the_weights_is_refused_by_name(asked: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_given(INITIAL, ModelConfig(**asked), "init_from X")


def test_null_and_equal_values_of_the_shape_are_no_contradiction() -> None:
    asked = ModelConfig(dim=32, ffn_dim=None, head_dim=8, attention="dual", dense_every=3)
    assert with_given(INITIAL, asked, "X") == INITIAL


def test_a_window_that_each_layer_overrides_is_refused() -> None:
    fitted = ModelConfig(dim=32, num_layers=2, num_heads=4, layer_windows=[4, 8])
    with pytest.raises(UserError, match=r"model.window 64 would have no effect.*--model.layer_windows null"):
        with_given(fitted, ModelConfig(window=64), "X")
    found = with_given(fitted, ModelConfig(window=64, layer_windows=None), "X")
    assert (found.window, found.layer_windows) == (64, None)


def configuration(**changes: object) -> PretrainConfig:
    config = parse_stage("pretrain", ["--data.path", "d", "--output", "o", "--seed", "3"])
    return dataclasses.replace(config, model=INITIAL, **changes)


def test_weights_that_come_one_by_one_are_those_of_the_model_that_is_built_at_once(tmp_path: Path) -> None:
    whole = build_model(configuration())
    model, weights = build_sharded_model(configuration())
    assert weights.tensors is not None
    given = dict(weights.tensors())
    assert list(given) == weights.order
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(torch.equal(given[name], value) for name, value in whole.named_parameters())
    resumed = Checkpoint(Path("a checkpoint"), 4, {})
    assert build_sharded_model(configuration(), resumed=resumed)[1].tensors is None

    (tmp_path / "tokenizer").write_bytes(b"")
    save_model(whole.to(torch.bfloat16), tmp_path / "saved", tmp_path / "tokenizer", {})
    config = configuration(init_from=str(tmp_path / "saved"))
    whole = build_model(config)
    _, weights = build_sharded_model(config)
    assert weights.tensors is not None
    assert weights.check is not None
    weights.check()
    given = dict(weights.tensors())
    assert list(given) == weights.order
    assert all(torch.equal(given[name].float(), value) for name, value in whole.named_parameters())


def test_weights_that_do_not_fit_are_found_before_any_is_taken(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").write_bytes(b"")
    save_model(build_model(configuration()), tmp_path / "saved", tmp_path / "tokenizer", {})
    other = dataclasses.replace(INITIAL, ffn_dim=48)
    config = dataclasses.replace(configuration(init_from=str(tmp_path / "saved")), model=other)
    check = build_sharded_model(config)[1].check
    assert check is not None
    with pytest.raises(UserError, match=r"layers\.0\.ffn\.down\.weight is \(32, "):
        check()
    path = tmp_path / "saved" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\1\0\1")
    with pytest.raises(UserError, match=r"model\.safetensors does not match the sha256"):
        check()
