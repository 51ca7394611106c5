"""Every name of torch, Lightning and DeepSpeed that is used here and that they do not promise to keep.

In: nothing.  Here: one function for each such name, which imports it when it is called.
``tests/test_compat.py`` has a test for each, which says what breaks without it; ``pyproject.toml`` bounds
the versions that these were tested with.

Three things of this kind stand elsewhere, because a function cannot hold them: the operators of torch that
the attention calls, and how one of them records a backward pass (``dualroute/attention``, which knows no
other folder), the hooks that our strategy overrides (``training/parallel/strategy.py``), and the keys of
Lightning's and DeepSpeed's saved states (``training/checkpointing``, ``training/step/module.py``).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def take_no_signals(trainer: Any) -> None:
    """Keep a Lightning Trainer from installing its own signal handlers.

    They run collectives at once, while ranks are signalled at different moments.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None


def flight_records() -> list[dict[str, Any]]:
    """What torch's flight recorders hold of this process: NCCL's own first, where there is one, then the one
    of all other back ends.  Empty ones where recording is off (``TORCH_FR_BUFFER_SIZE``).
    """
    from torch._C import _distributed_c10d

    # a build with CUDA has both; a CPU build has the second alone
    readers = [
        getattr(_distributed_c10d, name, None) for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json")
    ]
    return [json.loads(read()) for read in readers if read is not None]


def flight_dump() -> bytes:
    """The same in the form that torch's own ``torchfrtrace`` reads, of NCCL where there is NCCL."""
    from torch._C import _distributed_c10d

    read = getattr(_distributed_c10d, "_dump_nccl_trace", None) or _distributed_c10d._dump_fr_trace  # type: ignore[attr-defined]
    dump: bytes = read()
    return dump


def zero3_gradient_norm(optimizer: Any) -> Any:
    """The 2-norm of the whole gradient under DeepSpeed's ZeRO-3, still times the loss scale."""
    from deepspeed.runtime.utils import combine_grad_norm_groups

    return combine_grad_norm_groups(optimizer._get_norm_groups())


@contextmanager
def read_partitions_from(optimizer: Any, state: Any) -> Iterator[None]:
    """Inside, DeepSpeed's loader of universal checkpoints reads, of each parameter, this rank's elements
    alone.

    It would read every parameter whole, on every rank, and cut its part out.

    Args:
        optimizer: DeepSpeed's of ZeRO 1, 2 or 3.
        state: Gives ``read_range(name, key, start, count)`` for the ``keys_of(name)``, which are fp32,
            exp_avg and, but for Muon's, exp_avg_sq; and ``step``.
    """
    import math
    import os
    from types import MethodType

    import torch

    def part_of_stage_three(folder: str, key: str, param: Any = None) -> Any:
        group = optimizer._get_param_partition_group(param)
        ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        part = math.ceil(param.ds_numel / ranks)
        start = min(rank * part, param.ds_numel)
        count = min(part, param.ds_numel - start)
        found, name = torch.zeros(part, dtype=torch.float32), os.path.basename(folder)
        if count and key in state.keys_of(name):
            found[:count] = state.read_range(name, key, start, count)
        return found

    def fragment(parameter: Any, folder: str, *_: Any, **__: Any) -> Any:
        mapping, name = parameter._hp_mapping, os.path.basename(folder)
        place = mapping.lp_fragment_address
        read = {
            key: state.read_range(name, key, place.start, place.numel).to(torch.float32, copy=True)
            for key in state.keys_of(name)
        }
        mapping.get_hp_fragment().data.copy_(read.pop("fp32"))
        mapping.optim_fragment = read
        return state.step.clone()

    if hasattr(optimizer, "load_hp_checkpoint_state"):
        optimizer.load_hp_checkpoint_state = part_of_stage_three  # before the class's own
        try:
            yield
        finally:
            del optimizer.load_hp_checkpoint_state
        return
    # the latter in bfloat16 at stage 1
    groups = optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups
    parameters = [parameter for group in groups for parameter in group]
    before = [parameter.load_hp_checkpoint_state for parameter in parameters]
    for parameter in parameters:
        parameter.load_hp_checkpoint_state = MethodType(fragment, parameter)
    try:
        yield
    finally:
        for parameter, own in zip(parameters, before, strict=True):
            parameter.load_hp_checkpoint_state = own


def divided_parameters(optimizer: Any) -> Iterator[tuple[Any, Any, list[tuple[Any, int, int, int, bool]]]]:
    """What DeepSpeed's ZeRO has made of an optimizer's parameters on this rank.

    Args:
        optimizer: DeepSpeed's of ZeRO 1, 2 or 3.

    Yields:
        A flat parameter that is stepped here, the ranks that share what is in its group, and of each
        parameter in the group: itself, its first element here, where that lies in the flat one, how many are
        here, and whether it is cut up.
    """
    import torch

    def of_group(group: Any) -> tuple[int, int]:
        return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)

    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            group = optimizer.sub_group_process_groups[index]
            rank, ranks = of_group(group)
            found, offset = [], 0
            for parameter in optimizer.fp16_groups[index]:
                part = parameter.ds_tensor.ds_numel
                first = min(rank * part, parameter.ds_numel)
                count = min(part, parameter.ds_numel - first)
                found.append((parameter, first, offset, count, ranks > 1))
                offset += part
            yield flat, group, found
        return
    if hasattr(optimizer, "round_robin_bit16_offsets"):
        flats, groups = optimizer.single_partition_of_fp32_groups, optimizer.round_robin_bit16_groups
        all_offsets = optimizer.round_robin_bit16_offsets
    else:  # stage 1 in bfloat16
        flats, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
        all_offsets = [_offsets(parameters) for parameters in groups]
    for flat, group, parameters, offsets in zip(
        flats, optimizer.real_dp_process_group, groups, all_offsets, strict=True
    ):
        size = flat.numel()
        begin = of_group(group)[0] * size
        found = []
        for parameter, offset in zip(parameters, offsets, strict=True):
            end = offset + parameter.numel()
            first, last = max(offset, begin), min(end, begin + size)
            count = max(last - first, 0)
            cut = offset // size != (end - 1) // size
            found.append((parameter, first - offset, first - begin, count, cut))
        yield flat, group, found


def _offsets(parameters: Any) -> list[int]:
    from itertools import accumulate

    return [0, *accumulate(parameter.numel() for parameter in parameters)][:-1]


def zero3_partition(parameter: Any, first: Any, config: dict[str, Any]) -> None:
    """Leave 1/N of ``parameter``, which all N ranks of the world hold, on each: rank 0's values.  Collective.

    Args:
        parameter: On the device where it will be trained, in its dtype.
        first: A parameter that was partitioned before, whose groups and settings serve this one too; null
            makes them from ``config``.
        config: DeepSpeed's, complete.
    """
    if first is not None:
        first.convert_to_zero_parameters([parameter])
        return
    import deepspeed
    import torch

    deepspeed.zero.Init(module=torch.nn.ParameterList([parameter]), config_dict_or_path=config)


def complete_deepspeed_config(strategy: Any) -> dict[str, Any]:
    """The configuration of Lightning's DeepSpeed strategy with what the Trainer adds to it."""
    strategy._init_config_if_needed()
    config: dict[str, Any] = strategy.config
    return config


def make_second_partition_once() -> None:
    """Let DeepSpeed's groups of a second partition (ZeRO++ hpZ) serve every model of this process.

    Its ``zero.Init`` makes them again for each model that it divides, and fails at the second.
    """
    from deepspeed.utils import groups

    make = groups._create_zero_param_parallel_group
    if hasattr(make, "once"):
        return

    def make_once(group_size: int) -> None:
        if groups._get_zero_param_intra_parallel_group() is None:
            make(group_size)

    make_once.once = True  # type: ignore[attr-defined]
    groups._create_zero_param_parallel_group = make_once


def spare_shared_memory_op() -> None:
    """Tell DeepSpeed that its ``deepspeed_shm_comm`` cannot be built, which saves 50 seconds of g++ on a CPU.

    The op serves inference only; the table is documented to keep edits.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def optimizer_leaves_scaling_to_others(optimizer: Any) -> None:
    """Let a fused optimizer's gradients be unscaled and clipped before its step, as those of any other.

    Lightning refuses to clip, in bfloat16 too, where an optimizer says that it could unscale by itself.
    """
    optimizer._step_supports_amp_scaling = False


def inductor() -> tuple[Any, Any, Any]:
    """torch's compiler: its ``compile_fx``, its configuration and dynamo's, with its log quiet."""
    import torch._dynamo.config
    import torch._inductor.config
    from torch._inductor import compile_fx

    logging.getLogger("torch._inductor.select_algorithm").setLevel(logging.ERROR)
    return compile_fx, torch._inductor.config, torch._dynamo.config


def compile_regions() -> None:
    """Let one process compile many kinds of layers, and a compiled layer stay whole inside DDP.

    torch gives up after eight programs of one function, and cuts what it compiles inside DDP at the borders
    of DDP's buckets; here every layer is a program by itself, which gives its gradients early enough.
    """
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 4096
    torch._dynamo.config.optimize_ddp = False


def size_varies(tensor: Any) -> None:
    """Have a compiled program take any size in the first dimension of this tensor, from the first one on."""
    import torch._dynamo

    torch._dynamo.maybe_mark_dynamic(tensor, 0)


def int4_packed_for_cpu(values: Any) -> Any:
    """int32 values 0…15 (N, K) in the layout that :func:`int4_product_on_cpu` reads."""
    import torch

    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)


def int4_product_on_cpu(rows: Any, packed: Any, group_size: int, scales_and_zeros: Any) -> Any:
    """(R, K) times a packed int4 weight → (R, N); scales_and_zeros (K / group_size, N, 2)."""
    import torch

    return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group_size, scales_and_zeros)


def int8_product_on_cuda(rows: Any, weight: Any) -> Any:
    """int8 (R, K) times int8 (K, N) → int32 (R, N) on tensor cores; R > 16, K and N multiples of 8."""
    import torch

    return torch._int_mm(rows, weight)


def fp16_on_cpu() -> bool:
    """Whether this processor computes in fp16 (avx512_fp16); False where torch cannot tell."""
    import torch

    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return supported is not None and bool(supported())
