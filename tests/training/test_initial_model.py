"""What of the configuration counts beside ``init_from``: whatever was given, default or not."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from dualroute.cli import parse_stage
from dualroute.errors import UserError
from dualroute.model import ModelConfig
from dualroute.training.initial_model import with_given

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
