"""What is written for DeepSpeed, and what a user's own file may and may not say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dualroute.errors import UserError
from dualroute.training.config import ParallelConfig
from dualroute.training.parallel.deepspeed_config import deepspeed_config


def written(folder: Path, content: dict[str, Any], suffix: str = "json") -> str:
    path = folder / f"ds.{suffix}"
    path.write_text(json.dumps(content) if suffix == "json" else yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_user_settings_win_and_ours_stay(tmp_path: Path, suffix: str) -> None:
    path = written(
        tmp_path, {"zero_optimization": {"stage": 3, "reduce_bucket_size": 77}, "aio": {"a": 1}}, suffix
    )
    made = deepspeed_config(ParallelConfig(deepspeed_config=path), micro_batch=4, on_cpu=True)
    assert made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"]["reduce_bucket_size"] == 77
    assert made["zero_optimization"]["overlap_comm"] is False
    assert made["train_micro_batch_size_per_gpu"] == 4
    assert made["aio"] == {"a": 1}


def test_same_value_twice_and_auto_are_no_contradiction(tmp_path: Path) -> None:
    content = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
    }
    config = ParallelConfig(zero_stage=1, deepspeed_config=written(tmp_path, content))
    made = deepspeed_config(config, micro_batch=4, accumulation=3, gradient_clip=1.0, precision="bf16-mixed")
    assert made["bf16"]["enabled"] is True
    # These come from the Trainer; Lightning refuses a configuration that has them.
    assert "gradient_accumulation_steps" not in made
    assert "gradient_clipping" not in made


def test_a_loss_scale_of_the_user_does_not_turn_fp16_off(tmp_path: Path) -> None:
    path = written(tmp_path, {"fp16": {"initial_scale_power": 12}})
    made = deepspeed_config(ParallelConfig(deepspeed_config=path), micro_batch=1, precision="16-mixed")
    assert made["fp16"] == {"enabled": True, "initial_scale_power": 12}


def test_stage_defaults_to_two() -> None:
    assert deepspeed_config(ParallelConfig(), micro_batch=1)["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu is 8, but micro_batch is 4"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps is 8, but accumulation is 2"),
        ({"gradient_clipping": 0.3}, "gradient_clipping is 0.3, but the clipping of the optimizer is 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, but with precision=32-true, bf16 is False"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, but zero_stage is 2"),
        ({"zero_optimization": 3}, "zero_optimization is 3, not a table"),
        ({"zero_optimisation": {}}, "did you mean 'zero_optimization'"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size=2 cannot be used: .* trains wrongly"),
        ({"data_parallel_size": 2}, "data_parallel_size=2 cannot be used: .* trains wrongly"),
        ({"optimizer": {"type": "Adam"}}, "optimizer=.* cannot be used"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "compute_grad_norm=False cannot be used"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
            "offload_optimizer.device nvme cannot be used: .* use cpu",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/x"}}},
            "nvme needs zero_stage 3, not 2",
        ),
        ({"bf16": {"check_grad_overflow": False}}, "check_grad_overflow=False cannot be used"),
    ],
)
def test_contradictions_name_the_file_and_both_sides(
    tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    config = ParallelConfig(zero_stage=2, deepspeed_config=written(tmp_path, content))
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}.*{message}") as caught:
        deepspeed_config(config, micro_batch=4, accumulation=2, gradient_clip=1.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ParallelConfig(zero_stage=0, offload_optimizer=True),
            "offload_optimizer needs zero_stage 1 or 2 or 3",
        ),
        (
            ParallelConfig(zero_stage=2, offload_parameters=True),
            "offload_parameters needs zero_stage 3, not 2",
        ),
        (ParallelConfig(zero_stage=0), "16-mixed needs zero_stage 1, 2 or 3"),
        (ParallelConfig(deepspeed_config="nowhere.json"), "nowhere.json: no such file"),
    ],
)
def test_settings_that_cannot_be(config: ParallelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        deepspeed_config(config, micro_batch=1, precision="16-mixed")


@pytest.mark.parametrize(("name", "text"), [("a.json", "{,}"), ("a.yaml", "a: [1"), ("b.yaml", "- 1")])
def test_unreadable_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name) as caught:
        deepspeed_config(ParallelConfig(deepspeed_config=str(tmp_path / name)), micro_batch=1)
    assert "\n" not in str(caught.value)


def test_a_second_partition_and_sums_in_float32_are_written(tmp_path: Path) -> None:
    config = ParallelConfig(zero_stage=3, zero_hpz_partition_size=4, gradient_reduction="fp32")
    made = deepspeed_config(config, micro_batch=1, world_size=8, precision="bf16-mixed")
    assert made["zero_optimization"]["zero_hpz_partition_size"] == 4
    assert made["communication_data_type"] == "fp32"
    plain = deepspeed_config(ParallelConfig(zero_stage=3), micro_batch=1, world_size=8)
    assert "zero_hpz_partition_size" not in plain["zero_optimization"]
    assert "communication_data_type" not in plain
    own = {"communication_data_type": "fp32", "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    path = written(tmp_path, own)
    made = deepspeed_config(ParallelConfig(deepspeed_config=path), micro_batch=1, world_size=8)
    assert made["zero_optimization"]["zero_hpz_partition_size"] == 2
    assert made["communication_data_type"] == "fp32"
    both = ParallelConfig(zero_hpz_partition_size=4, deepspeed_config=path)
    with pytest.raises(UserError, match="zero_hpz_partition_size is 2, but zero_hpz_partition_size is 4"):
        deepspeed_config(both, micro_batch=1, world_size=8)


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        ({"zero_stage": 2}, 8, "zero_hpz_partition_size 4 needs zero_stage 3, not 2"),
        ({"zero_stage": 3}, 6, "zero_hpz_partition_size 4 does not divide the 6 ranks: use 3"),
        ({"zero_stage": 3}, 2, "does not divide the 2 ranks: use 2"),
        ({"zero_stage": 3, "offload_parameters": True}, 8, "offload_parameters on the host: use one of them"),
    ],
)
def test_second_partitions_that_cannot_be(config: dict[str, Any], world_size: int, message: str) -> None:
    parallel = ParallelConfig(zero_hpz_partition_size=4, **config)
    with pytest.raises(UserError, match=message):
        deepspeed_config(parallel, micro_batch=1, world_size=world_size)


def test_mics_is_refused_by_name_with_what_to_use(tmp_path: Path) -> None:
    path = written(tmp_path, {"zero_optimization": {"stage": 3, "mics_shard_size": 8}})
    with pytest.raises(UserError, match=r"mics_shard_size asks for MiCS.*zero_hpz_partition_size"):
        deepspeed_config(ParallelConfig(deepspeed_config=path), micro_batch=1, world_size=8)
