"""What four ranks of test_partition.py do: ZeRO-3 with and without a second partition, sums in float32."""

import json
import logging
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from dualroute.training.parallel.reduction import mean_in_float32
from tests.training.parallel.processes import strategy_runs

PARTITIONED = {"strategy": "deepspeed", "zero_stage": 3, "steps": 8}
CASES = {
    "flat": PARTITIONED,
    "hpz": {**PARTITIONED, "hpz": 2},
    "hpz again": {**PARTITIONED, "hpz": 2, "accumulation": 2, "clip": 0.5},
    "bf16": {**PARTITIONED, "hpz": 2, "precision": "bf16-mixed"},
    "bf16, fp32": {**PARTITIONED, "hpz": 2, "precision": "bf16-mixed", "gradient_reduction": "fp32"},
}


def watch_partitions(found: list[int]) -> None:
    """Note at each step how many elements of second partitions the gradients were computed with."""
    original = strategy_runs.Module.on_before_optimizer_step

    def noted(self, optimizer):
        second = [getattr(parameter, "ds_secondary_tensor", None) for parameter in self.parameters()]
        found.append(sum(tensor.numel() for tensor in second if tensor is not None))
        original(self, optimizer)

    strategy_runs.Module.on_before_optimizer_step = noted


def divided_twice() -> list[int]:
    """Elements of 64 that a rank keeps of each of two models that are divided while they are built."""
    import deepspeed

    partition = {"stage": 3, "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": partition}
    kept = []
    for _ in range(2):
        with deepspeed.zero.Init(config_dict_or_path=config):
            kept.append(torch.nn.Linear(8, 8, bias=False).weight.ds_tensor.numel())
    return kept


def reduced(wide: bool) -> bool:
    """Whether DDP's mean of random gradients in bfloat16 is the exact one, rounded once."""
    module = torch.nn.Linear(256, 1, bias=False, dtype=torch.bfloat16)
    model = torch.nn.parallel.DistributedDataParallel(module)
    if wide:
        model.register_comm_hook(None, mean_in_float32)
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(dist.get_world_size(), 1, 256, generator=draw).bfloat16()
    model(inputs[dist.get_rank()]).sum().backward()
    return torch.equal(module.weight.grad, inputs.double().mean(dim=0).float().bfloat16())


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    settings, results = map(Path, sys.argv[1:])
    settings.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    answers, second = {}, []
    watch_partitions(second)
    for name, case in CASES.items():
        answers[name] = {**strategy_runs.run(**case, deepspeed_config=str(settings)), "second": second[:]}
        second.clear()
    answers["divided"] = divided_twice()
    answers["ddp"] = [reduced(False), reduced(True)]
    if dist.get_rank() == 0:
        results.write_text(json.dumps(answers))
    dist.destroy_process_group()
