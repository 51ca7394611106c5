"""Every name of torch, Lightning and DeepSpeed that is used here and that they do not promise to keep.

In: nothing.  Here: one function for each such name, which imports it when it is called.
``tests/test_compat.py`` has a test for each, which says what breaks without it; ``pyproject.toml`` bounds
the versions that these were tested with.

Three things of this kind stand elsewhere, because a function cannot hold them: the operators of torch that
the attention calls, and how one of them records a backward pass (``dualroute/attention``, which knows no
other folder), the hooks that our strategy
overrides (``training/parallel/strategy.py``), and the keys of Lightning's and DeepSpeed's saved states
(``training/checkpointing``, ``training/step/module.py``).
"""

from __future__ import annotations

import json
import logging
from typing import Any


def take_no_signals(trainer: Any) -> None:
    """Keep a Lightning Trainer from installing its own signal handlers.

    They run collectives at once, while ranks are signalled at different moments.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None


def last_collectives() -> list[int]:
    """The last collective that this process started on each of its groups, by torch's flight recorder.

    Empty where the recorder is off (``TORCH_FR_BUFFER_SIZE``).
    """
    from torch._C import _distributed_c10d

    trace = json.loads(_distributed_c10d._dump_fr_trace_json())  # type: ignore[attr-defined]
    return [int(group["last_enqueued_collective"]) for group in trace.get("pg_status", {}).values()]


def zero3_gradient_norm(optimizer: Any) -> Any:
    """The 2-norm of the whole gradient under DeepSpeed's ZeRO-3, still times the loss scale."""
    from deepspeed.runtime.utils import combine_grad_norm_groups

    return combine_grad_norm_groups(optimizer._get_norm_groups())


def spare_shared_memory_op() -> None:
    """Tell DeepSpeed that its ``deepspeed_shm_comm`` cannot be built, which saves 50 seconds of g++ on a CPU.

    The op serves inference only; the table is documented to keep edits.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


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
