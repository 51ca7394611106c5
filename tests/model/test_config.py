import dataclasses
import itertools
import json

import pytest
import torch

from dualroute.attention import DualRouting
from dualroute.errors import UserError
from dualroute.model import ModelConfig
from dualroute.model.ends_config import TaskHeadConfig
from dualroute.model.layers import TransformerBlock


def test_nulls_are_derived_from_the_numbers_that_are_given():
    config = ModelConfig(dim=96, num_heads=6, num_kv_heads=2).resolved()
    assert (config.head_dim, config.global_heads, config.local_heads) == (16, 3, 3)
    assert config.ffn_dim == 256


def test_overriding_one_number_moves_what_depends_on_it():
    assert ModelConfig(dim=512).resolved().ffn_dim != ModelConfig(dim=256).resolved().ffn_dim


@pytest.mark.parametrize(("attention", "heads"), [("dense", (8, 0)), ("local", (0, 8)), ("dual", (4, 4))])
def test_attention_decides_who_gets_the_heads(attention, heads):
    config = ModelConfig(attention=attention).resolved()
    assert (config.global_heads, config.local_heads) == heads


def test_the_literal_sum_gives_each_route_all_heads():
    config = ModelConfig(global_heads=8, local_heads=8).resolved()
    assert (config.global_heads, config.local_heads) == (8, 8)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"dim": 100, "num_heads": 8}, "model.dim=100 is not a multiple of num_heads=8"),
        ({"num_kv_heads": 3}, "model.num_kv_heads=3 does not divide num_heads=8"),
        ({"head_dim": 7}, "model.head_dim=7 must be even"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"attention": "interleaved", "num_layers": 5}, "dense_every 6 is above model.num_layers 5"),
        ({"num_kv_heads": 4, "global_heads": 3}, "model.global_heads=3 is not a multiple of 2"),
        ({"global_layers": [1, 1]}, r"model.global_layers is \[1, 1\]: give ascending .* 0 to 3"),
        ({"global_layers": [4]}, "model.global_layers is"),
        ({"global_layers": []}, "model.global_layers is"),
        ({"global_layers": [1], "attention": "dense"}, "global_layers works with attention dual"),
        ({"num_kv_heads": 1}, "num_kv_heads=1 cannot be halved"),
        ({"global_heads": 0}, "model.global_heads=0 and local_heads=8: with attention dual both"),
        ({"auto_break_even": 0}, "model.auto_break_even=0"),
        ({"rope_theta": -1.0}, "model.rope_theta is -1.0"),
        ({"rope_theta": float("nan")}, "model.rope_theta is nan"),
        ({"vocab_size": 1}, "vocab_size is 1"),
        ({"rope_scaling": {"factor": 2.0, "beta": 1.0}}, "rope_scaling is .*beta"),
        ({"rope_scaling": {"factor": 0.0}}, "rope_scaling is .*0.0"),
        ({"cluster_span": 96}, "model.cluster_span=96 is not block=64 times 1, 2, 4"),
        ({"global_rotary_factor": 1.5}, "model.global_rotary_factor is 1.5"),
        (
            {"local_rotary_factor": 0.3, "head_dim": 16},
            "model.local_rotary_factor=0.3 of head_dim=16 is 4.8 channels, no multiple of 2: use 0.25",
        ),
    ],
)
def test_contradictions_name_the_key_and_the_value(values, named):
    with pytest.raises(UserError, match=named):
        ModelConfig(**values)


def test_a_file_from_before_positions_were_chosen_stays_what_it_was(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(ModelConfig(vocab_size=320, window=64).to_dict()))
    assert "rotary_factor" not in path.read_text()
    assert "cluster_span" not in path.read_text()
    config = ModelConfig.from_file(path)
    assert (config.global_rotary_factor, config.local_rotary_factor) == (1, 1)
    assert json.dumps(config.to_dict()) == path.read_text()
    path.write_text(json.dumps(dataclasses.replace(config, global_rotary_factor=0.0).to_dict()))
    assert ModelConfig.from_file(path).global_rotary_factor == 0


@pytest.mark.parametrize("attention", ["dual", "dense", "local"])
def test_each_route_has_its_own_positions(attention):
    config = ModelConfig(attention=attention, head_dim=16, global_rotary_factor=0.0, local_rotary_factor=0.5)
    with torch.device("meta"):
        layer = TransformerBlock(config.of_layer(0)).attention
    assert (layer.global_rope.channels, layer.local_rope.channels) == (0, 8)


def test_a_file_of_another_version_is_refused(tmp_path):
    path = tmp_path / "model.json"
    path.write_text('{"dim": 64, "moe_experts": 4}')
    with pytest.raises(UserError, match="moe_experts"):
        ModelConfig.from_file(path)
    path.write_text('{"dim": ')
    with pytest.raises(UserError, match=r"model\.json is damaged"):
        ModelConfig.from_file(path)


GRID = {
    "dim": (96, 80),
    "num_heads": (1, 2, 3, 6, 8),
    "num_kv_heads": (None, 0, 1, 2, 3, 4),
    "head_dim": (None, 8, 7),
    "global_heads": (None, 1, 2, 3, 9),
    "local_heads": (None, 1, 4),
}
READS = [
    {"block": 12}, {"block": 12, "router": "moment"}, {"sub_block": 0}, {"top_k": -1}, {"window": 0},
    {"rope_theta": 0.0}, {"router": "minmx"}, {"far_summary": "third"}, {"global_mode": "both"},
    {"auto_break_even": 0}, {"global_rotary_factor": 0.3}, {"local_rotary_factor": 0.25}, {},
]  # fmt: skip


def _built(options: dict) -> DualRouting | None:
    """The attention layer of what a block hands on, without the configuration's own check; None: refused."""
    config = object.__new__(ModelConfig)
    for name, value in {**ModelConfig(ffn_dim=8).to_dict(), **options}.items():
        object.__setattr__(config, name, value)
    try:
        with torch.device("meta"):
            return TransformerBlock(config).attention
    except ValueError:
        return None


def test_a_model_of_a_task_writes_no_text() -> None:
    config = ModelConfig(vocab_size=9, task_head=TaskHeadConfig("sequence", ["a", "b"]))
    with pytest.raises(UserError, match=r"generation predicts the next token.*use dualroute predict"):
        config.require_causal("generation")


def test_it_accepts_exactly_what_the_attention_builds():
    numbers = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    accepted = 0
    for options in [*numbers, *READS]:
        layer = _built(options)
        dual = layer is not None and layer.global_heads > 0 and layer.local_heads > 0
        try:
            resolved = ModelConfig(ffn_dim=8, **options).resolved()
        except UserError:
            assert not dual, options
            continue
        assert dual, options
        accepted += 1
        for name in ("head_dim", "global_heads", "local_heads"):
            assert getattr(resolved, name) == getattr(layer, name), options
    assert 50 < accepted < len(numbers) / 2


def test_what_auto_reads_is_in_the_file_and_2048_where_it_is_not(tmp_path):
    config = ModelConfig(auto_break_even=512, block=64, top_k=2)
    path = tmp_path / "model.json"
    path.write_text(json.dumps(config.to_dict()))
    assert ModelConfig.from_file(path) == config
    assert TransformerBlock(config.resolved()).attention.max_exact_blocks == 8
    older = config.to_dict()
    del older["auto_break_even"]
    path.write_text(json.dumps(older))
    read = ModelConfig.from_file(path)
    assert read.auto_break_even == 2048
    assert TransformerBlock(read.resolved()).attention.max_exact_blocks == 32
