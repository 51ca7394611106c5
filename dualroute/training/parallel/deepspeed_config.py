"""DeepSpeed's configuration for one run: our settings, and the user's own file merged on top.

- In: a :class:`ParallelConfig` (from the YAML of the run), optionally a DeepSpeed JSON or YAML, and the
  numbers that DeepSpeed wants to know too (micro-batch, accumulation, clipping, precision).
- Here: one dictionary; what contradicts, trains wrongly or is misspelt is refused with the reason.
- Next: ``training/parallel/strategy.py`` hands it to Lightning's DeepSpeed strategy.

DeepSpeed says nothing about a top-level key it does not know, and two keys that it does
know (``sequence_parallel_size``, ``data_parallel_size``) run without an error and train to another loss.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dualroute.errors import UserError
from dualroute.training.config import ParallelConfig

ZERO_STAGES = (0, 1, 2, 3)
DEFAULT_ZERO_STAGE = 2


def deepspeed_config(
    config: ParallelConfig,
    *,
    micro_batch: int,
    accumulation: int = 1,
    gradient_clip: float | None = None,
    precision: str = "32-true",
    on_cpu: bool = False,
    world_size: int = 1,
) -> dict[str, Any]:
    """DeepSpeed's configuration for this run, without what the Trainer sets itself (accumulation, clipping).

    The user's file wins over our defaults and may repeat our settings, but not contradict them: UserError
    then names the key and both values.
    """
    where = config.deepspeed_config or ""
    user = _read_config(config.deepspeed_config)
    _refuse_keys(user, where)
    zero = user.pop("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"{where}: zero_optimization is {zero!r}, not a table of settings like {{stage: 2}}")
    if removed := sorted(key for key in zero if str(key).startswith("mics_")):
        raise UserError(
            f"{where}: zero_optimization.{removed[0]} asks for MiCS, which DeepSpeed 0.19 no longer has: use "
            f"parallel.zero_hpz_partition_size (the ranks of a node) at ZeRO 3"
        )
    stage = _agree(where, zero, "zero_optimization.stage", "zero_stage", config.zero_stage)
    stage = DEFAULT_ZERO_STAGE if stage is None else stage
    if stage not in ZERO_STAGES or isinstance(stage, bool):
        raise UserError(f"zero_stage={stage!r} is unknown: use 0 (no sharding), 1, 2 or 3")
    _agree(where, user, "train_micro_batch_size_per_gpu", "micro_batch", micro_batch)
    _agree(where, user, "gradient_accumulation_steps", "accumulation", accumulation)
    _agree(where, user, "gradient_clipping", "the clipping of the optimizer", gradient_clip or 0.0)
    for name, enabled in (("bf16", precision.startswith("bf16")), ("fp16", precision.startswith("16"))):
        if isinstance(user.get(name), dict):
            _agree(where, user[name], f"{name}.enabled", f"with precision={precision}, {name}", enabled)
    key, hpz = "zero_hpz_partition_size", config.zero_hpz_partition_size
    hpz = _agree(where, zero, f"zero_optimization.{key}", key, None if hpz == 1 else hpz) or 1
    check_hpz(hpz, stage, world_size, offload=config.offload_parameters or "offload_param" in zero)
    section = _zero_section(config, stage, zero, on_cpu)
    _check_nvme(section, where)
    if hpz > 1:
        section[key] = hpz
    reduced_in = "fp32" if config.gradient_reduction == "fp32" else None
    reduced_in = _agree(where, user, "communication_data_type", "parallel.gradient_reduction", reduced_in)
    if stage == 0 and precision.startswith("16"):
        # FP16_UnfusedOptimizer is no ZeROOptimizer, and engine.backward scales the loss for those only
        raise UserError(
            f"train.precision {precision} needs zero_stage 1, 2 or 3: at stage 0 DeepSpeed 0.19 divides "
            "gradients by a loss scale that it has not multiplied the loss by"
        )
    ours = {
        "zero_allow_untested_optimizer": True,
        # torch's own AdamW may run on the host: nothing has to be compiled (DeepSpeedCPUAdam is faster).
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": micro_batch,
        "zero_optimization": section,
    }
    if reduced_in is not None:
        ours["communication_data_type"] = reduced_in
    return _merged(ours | _precision_sections(precision, stage), user)


def check_hpz(size: int, stage: int, world_size: int, *, offload: bool = False) -> None:
    """Refuse a second partition over ``size`` ranks (parallel.zero_hpz_partition_size) that cannot be.

    Raises:
        UserError: Naming the key, what it contradicts and a size that could be.
    """
    key = f"parallel.zero_hpz_partition_size {size!r}"
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UserError(f"{key} is no number of ranks: use 1 for none, or the ranks of a node")
    if size == 1:
        return
    if stage != 3:
        raise UserError(
            f"{key} needs zero_stage 3, not {stage}, which does not partition parameters: leave it out"
        )
    if offload:
        raise UserError(
            f"{key} keeps parameters on the devices and offload_parameters on the host: use one of them"
        )
    if world_size % size:
        fitting = max(n for n in range(1, min(size, world_size) + 1) if world_size % n == 0)
        raise UserError(f"{key} does not divide the {world_size} ranks: use {fitting}")


def _zero_section(
    config: ParallelConfig, stage: int, user: Mapping[str, Any], on_cpu: bool
) -> dict[str, Any]:
    # Sizes in elements: Lightning's choice on a GPU; 16 M elements (64 MB in fp32) are plenty for gloo.
    bucket = 2**24 if on_cpu else 200_000_000
    ours: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": not on_cpu,
        "allgather_bucket_size": bucket,
        "reduce_bucket_size": bucket,
    }
    for name, key, wanted, stages in (
        ("offload_optimizer", "offload_optimizer", config.offload_optimizer, (1, 2, 3)),
        ("offload_parameters", "offload_param", config.offload_parameters, (3,)),
    ):
        if wanted and stage not in stages:
            raise UserError(f"{name} needs zero_stage {' or '.join(map(str, stages))}, not {stage}")
        if wanted or key in user:
            ours[key] = {"device": "cpu", "pin_memory": not on_cpu}  # pinning would compile an op on a CPU
    return _merged(ours, user)


def uses_nvme(zero: Mapping[str, Any]) -> bool:
    """Whether parameters lie in files (DeepSpeed's ``async_io``)."""
    return (zero.get("offload_param") or {}).get("device") == "nvme"


def _check_nvme(zero: Mapping[str, Any], where: str) -> None:
    if (zero.get("offload_optimizer") or {}).get("device") == "nvme":
        # engine.load_checkpoint leaves out _load_zero_checkpoint then, and copies files of large tensors only
        raise UserError(
            f"{where}: zero_optimization.offload_optimizer.device nvme cannot be used: DeepSpeed 0.19 does "
            "not load such a state again, so a resumed run goes on from other weights; use cpu "
            "(offload_param may be nvme)"
        )
    if uses_nvme(zero):
        if zero["stage"] != 3:
            raise UserError(f"{where}: offload_param.device nvme needs zero_stage 3, not {zero['stage']}")
        if not zero["offload_param"].get("nvme_path"):
            raise UserError(f"{where}: offload_param.device nvme needs a folder: offload_param.nvme_path")


def _precision_sections(precision: str, stage: int) -> dict[str, Any]:
    if precision == "bf16-mixed" and stage == 0:
        # Stage 0 cannot add 16-bit gradients up in fp32: fp32 parameters under autocast, as in one process.
        return {"bf16": {"enabled": False}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    if precision.startswith("bf16") and stage > 0:
        # 16-bit parameters over fp32 masters; sums in bf16 would lose the gradients of small micro-batches.
        return {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if precision.startswith("16"):
        # Lightning leaves alone a section that is there (a user's loss scale), and would train in float32
        return {"fp16": {"enabled": True}}
    return {}  # bf16-true at stage 0: Lightning writes the section


# Keys of a DeepSpeed configuration that would break the run, each with the reason and the remedy.
_REFUSED = {
    "sequence_parallel_size": "DeepSpeed takes it but then trains wrongly (another loss): use "
    "parallel.sequence_parallel instead",
    "data_parallel_size": "DeepSpeed takes it but then trains wrongly (another loss): remove it",
    "optimizer": "the optimizer is set by the optimizer section of the run: remove it",
    "scheduler": "the learning-rate schedule is set by the optimizer section of the run: remove it",
    "train_batch_size": "it follows from tokens per batch: remove it",
    "managed_gradient_accumulation": "accumulation is driven by the trainer: remove it",
    "gradient_allreduce_op": "the loss is already a mean over all ranks: remove it",
    "zero_optimization.compute_grad_norm": "bad steps are recognised by the gradient norm: remove it",
    "zero_optimization.zenflow": "it updates between steps, so a bad step could not be skipped: remove it",
    "bf16.check_grad_overflow": "bad steps are skipped through it: remove it",
}

# The top-level keys of DeepSpeed 0.19 that this project can train with.
_KNOWN_KEYS = (
    "activation_checkpointing", "aio", "bf16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_types", "disable_allgather",
    "disable_python_gc", "dump_state", "flops_profiler", "fp16", "gradient_accumulation_steps",
    "gradient_clipping", "gradient_predivide_factor", "log_level", "memory_breakdown", "prescale_gradients",
    "steps_per_print", "tensorboard", "timers", "torch_autocast", "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)  # fmt: skip


def asked_stage(config: ParallelConfig) -> int | None:
    """The ZeRO stage that a key or the user's file asks for; None: neither does.

    Raises:
        UserError: The file cannot be read.
    """
    if config.zero_stage is not None:
        return config.zero_stage
    zero = _read_config(config.deepspeed_config).get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, Mapping) else None
    return stage if isinstance(stage, int) else None


def _refuse_keys(user: Mapping[str, Any], where: str) -> None:
    for path, reason in _REFUSED.items():
        section: Any = user
        for key in path.split("."):
            section = section.get(key) if isinstance(section, Mapping) else None
        if section is not None and section != "auto":
            raise UserError(f"{where}: {path}={section!r} cannot be used: {reason}")
    for key in user:
        if key not in _KNOWN_KEYS:
            near = difflib.get_close_matches(key, _KNOWN_KEYS, n=1)
            raise UserError(
                f"{where}: {key!r} is no DeepSpeed setting that can be used here"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )


def _agree(where: str, section: dict[str, Any], path: str, our_name: str, ours: Any) -> Any:
    """Takes the last key of ``path`` out of the user's section; the value of both sides, or UserError."""
    theirs = section.pop(path.split(".")[-1], None)
    if theirs in (None, "auto"):
        return ours
    if ours is not None and theirs != ours:
        raise UserError(
            f"{where}: {path} is {theirs}, but {our_name} is {ours}: give it once, or the same value twice"
        )
    return theirs


def _read_config(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    if not Path(path).is_file():
        raise UserError(f"deepspeed_config={path}: no such file")
    text = Path(path).read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        kind, problem = ("JSON" if path.endswith(".json") else "YAML"), " ".join(str(error).split())
        raise UserError(f"deepspeed_config={path}: not readable as {kind}: {problem}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"deepspeed_config={path}: a table of DeepSpeed settings is expected, not {content!r}"
        )
    return content


def _merged(ours: dict[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Theirs over ours, table by table; "auto", which other trainers want filled in, keeps ours."""
    result = dict(ours)
    for key, value in theirs.items():
        if isinstance(value, Mapping):
            inside = result.get(key)
            result[key] = _merged(inside if isinstance(inside, dict) else {}, value)
        elif value != "auto":
            result[key] = value
    return result
