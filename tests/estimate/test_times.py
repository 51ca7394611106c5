"""Times by hand; and that each recipe divides over the GPUs that it names."""

import re

import pytest

from dualroute.cli import parse_stage
from dualroute.errors import UserError
from dualroute.estimate.times import accumulation, times
from dualroute.model import ModelConfig
from dualroute.training.parallel.environment import World
from dualroute.training.parallel.sequence import check_sequence_parallel
from tests.conftest import ROOT

MODEL = ModelConfig(vocab_size=8, dim=64, num_layers=10, num_heads=4, ffn_dim=256).resolved()
ROUND = [
    *("--data.context", "1000", "--train.micro_batch", "1", "--train.tokens_per_batch", "64000"),
    *("--train.max_steps", "100", "--peak_tflops", "1", "--mfu", "0.5", "--overlap", "0"),
    *("--node_bandwidth", "100", "--network_bandwidth", "10", "--gpus_per_node", "4"),
    *("--launches_forward", "10", "--launches_backward", "20", "--launch_microseconds", "10"),
    *("--train.precision", "bf16-mixed", "--storage_bandwidth", "100", "--rank_bandwidth", "2"),
]
PARAMETERS, FLOPS = 10**9, 1e6


def of(*more):
    config = parse_stage("estimate", [*ROUND, *more])
    return times(config, MODEL, PARAMETERS, FLOPS)


@pytest.mark.parametrize(
    ("more", "gigabytes"),
    [
        # 16 ranks, 15/16 of the bytes over 10 GB/s between nodes of 4 GPUs, 4 micro-steps
        (("--parallel.strategy", "ddp"), 2 * 4),
        (("--parallel.zero_stage", "0"), 2 * 4),
        (("--parallel.zero_stage", "1"), 2 + 2),
        (("--parallel.zero_stage", "2"), 4 * 2 + 2),
        (("--parallel.zero_stage", "3"), 4 * (2 + 2 + 2)),
        (("--parallel.zero_stage", "3", "--parallel.gradient_reduction", "fp32"), 4 * (2 + 2 + 4)),
        (("--parallel.zero_stage", "3", "--train.precision", "32"), 4 * (4 + 4 + 4)),
        (("--parallel.strategy", "ddp", "--train.precision", "bf16-true"), 2 * 2),
    ],
)
def test_traffic_by_stage(more, gigabytes):
    took = of("--gpus", "16", *more)
    assert took.micro_steps == 4
    assert took.gradients_and_weights == pytest.approx(gigabytes * 15 / 16 / 10)
    assert took.waited == pytest.approx(took.gradients_and_weights)


def test_a_second_partition_gathers_inside_the_node():
    took = of("--gpus", "16", "--parallel.zero_stage", "3", "--parallel.zero_hpz_partition_size", "4")
    assert took.gradients_and_weights == pytest.approx(4 * (4 * 15 / 16 / 10 + 2 * 3 / 4 / 100))
    one_node = of("--gpus", "4", "--parallel.zero_stage", "3")
    assert one_node.gradients_and_weights == pytest.approx(16 * 6 * 3 / 4 / 100)


def test_arithmetic_launches_and_what_hides():
    took = of("--gpus", "16", "--parallel.zero_stage", "1")
    assert took.arithmetic == pytest.approx(1e6 * 64000 / 16 / 0.5e12)
    assert took.launches == pytest.approx(4 * 10 * 30 * 10e-6)
    assert took.step == pytest.approx(took.launches + took.waited), "the launches are longer"
    again = of("--gpus", "16", "--train.activation_checkpointing", "full")
    assert again.arithmetic == pytest.approx(took.arithmetic * 4 / 3)
    assert again.launches == pytest.approx(4 * 10 * 40 * 10e-6)
    some = of("--gpus", "16", "--train.activation_checkpointing", "feed_forward")
    assert took.launches < some.launches < again.launches
    hidden = of("--gpus", "16", "--parallel.zero_stage", "1", "--overlap", "1", "--peak_tflops", "0.001")
    assert hidden.waited == 0
    assert hidden.step == hidden.arithmetic


def test_texts_that_are_shared_and_checkpoints():
    assert of("--gpus", "16").texts == 0
    took = of("--gpus", "16", "--parallel.sequence_parallel", "4")
    assert took.micro_steps == 16
    # 250 tokens, 2 x (64 + 64) wide, of 2 bytes, there and back in 10 layers, 3/4 of it inside a node
    assert took.texts == pytest.approx(16 * 10 * 2 * 250 * 256 * 2 * 3 / 4 / 100e9)
    assert took.checkpoint == pytest.approx(max(12 / 100, 12 / 16 / 2) + 2 / 2)
    assert of("--gpus", "16", "--parallel.strategy", "ddp").checkpoint == pytest.approx(12 / 2 + 2 / 2)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="tokens_per_batch=64000 is not a multiple"):
        of("--gpus", "3")
    with pytest.raises(UserError, match="zero_hpz_partition_size 3 does not divide the 16 ranks"):
        of("--gpus", "16", "--parallel.zero_stage", "3", "--parallel.zero_hpz_partition_size", "3")


def named():
    """(recipe, GPUs, flags) of each head line "# GPUs: 8, 64; 256 with --flag value"."""
    for path in sorted((ROOT / "configs" / "pretrain").glob("*.yaml")):
        line = re.search(r"^# GPUs: (.*)$", path.read_text(), re.MULTILINE)
        for part in line.group(1).split("; ") if line else []:
            counts, _, flags = part.partition(" with ")
            for count in re.findall(r"[\d,]*\d", counts):
                yield path.stem, int(count.replace(",", "")), flags.split()


@pytest.mark.parametrize(("recipe", "gpus", "flags"), list(named()))
def test_each_recipe_divides_over_the_gpus_that_it_names(recipe, gpus, flags):
    path = str(ROOT / "configs" / "pretrain" / f"{recipe}.yaml")
    words = ["--config", path, "--gpus", str(gpus), "--model.vocab_size", "32000", *flags]
    config = parse_stage("estimate", words)
    check_sequence_parallel(config.parallel.sequence_parallel, World(world_size=gpus), config.model)
    assert accumulation(config) >= 1
    assert config.optim.warmup_steps < config.train.total_steps / 4


def test_the_recipes_for_gpus_name_them():
    gpus = {}
    for recipe, count, _ in named():
        gpus.setdefault(recipe, []).append(count)
    assert gpus == {"160m": [8, 64], "410m": [8, 64, 256], "1b": [8, 64, 256], "7b": [8, 64, 256, 1024]}
