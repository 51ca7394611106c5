import pytest

from dualroute.errors import UserError
from dualroute.model import ModelConfig


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
        ({"dim": 100, "num_heads": 8}, "num_heads 8 does not divide model.dim 100"),
        ({"num_kv_heads": 3}, "num_kv_heads 3 does not divide model.num_heads 8"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"attention": "interleaved", "num_layers": 5}, "dense_every 6 is above model.num_layers 5"),
        ({"num_kv_heads": 4, "global_heads": 3}, "global_heads is 3"),
        ({"num_kv_heads": 1}, "global_heads is 0"),
        ({"vocab_size": 1}, "vocab_size is 1"),
        ({"rope_scaling": {"factor": 2.0, "beta": 1.0}}, "rope_scaling is .*beta"),
        ({"rope_scaling": {"factor": 0.0}}, "rope_scaling is .*0.0"),
    ],
)
def test_contradictions_name_the_key_and_the_value(values, named):
    with pytest.raises(UserError, match=named):
        ModelConfig(**values)


def test_a_file_of_another_version_is_refused(tmp_path):
    path = tmp_path / "model.json"
    path.write_text('{"dim": 64, "moe_experts": 4}')
    with pytest.raises(UserError, match="moe_experts"):
        ModelConfig.from_file(path)
    path.write_text('{"dim": ')
    with pytest.raises(UserError, match="not JSON"):
        ModelConfig.from_file(path)
