"""ZeRO-3 from the first byte: a model gets its weights already divided among the ranks.

In: a module whose model was built without weights (:mod:`dualroute.model.deferred_init`), and
:class:`InitialWeights`, which give them one at a time.  Here: :func:`shard` makes one parameter after the
other whole on the device, takes rank 0's values, and has DeepSpeed leave each rank its part before the next
one is made.  Next: DeepSpeed's engine finds a model that is partitioned already.

Only rank 0 draws or reads; the others are sent what it has.  So the weights are the same however many ranks
there are and whatever processors they have, and a file is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualroute import compat
from dualroute.model.checkpoint.format import replace_parameter
from dualroute.training.parallel.agreement import decided_by_rank_zero
from dualroute.training.step.allocator import giving_back_freed_memory


@dataclass(frozen=True)
class InitialWeights:
    """Where the weights of a model come from that was built without them.

    Attributes:
        order: Names of all parameters in the order in which they come; the same on every rank.
        tensors: (name, whole tensor on the CPU) in that order, called on rank 0; null where all weights will
            be replaced by a state that is resumed.
        check: Called on rank 0 before; a UserError that it raises is raised on every rank.
    """

    order: list[str]
    tensors: Callable[[], Iterator[tuple[str, Tensor]]] | None = None
    check: Callable[[], None] | None = None


def shard(
    module: nn.Module,
    weights: InitialWeights,
    config: Mapping[str, Any],
    device: torch.device,
    prefix: str = "",
) -> None:
    """Give ``module`` its weights, 1/N of each on each of N ranks.  Collective.

    A parameter is whole on every rank while it is divided.

    Args:
        module: Its parameters on the meta device are replaced, tied ones once; others are divided as they
            are, which must be alike on all ranks.
        weights: Of all parameters on the meta device.
        config: DeepSpeed's, complete.
        device: Where the model will be trained.
        prefix: What stands before the names of ``weights`` in ``module``.

    Raises:
        UserError: ``weights.check`` fails on rank 0.
    """
    if weights.check is not None:
        decided_by_rank_zero(weights.check)
    with giving_back_freed_memory():  # or what was whole for a moment would stay with each process
        _shard(module, weights, config, device, prefix)


def _shard(
    module: nn.Module, weights: InitialWeights, config: Mapping[str, Any], device: torch.device, prefix: str
) -> None:
    dtype = _dtype(config)
    first: nn.Parameter | None = None
    given = weights.tensors() if weights.tensors is not None and dist.get_rank() == 0 else None
    for name in weights.order:
        old = module.get_parameter(prefix + name)
        if given is None:
            whole = nn.Parameter(torch.zeros(old.shape, dtype=dtype, device=device))
        else:
            came, value = next(given)
            if came != name:
                raise RuntimeError(f"the weights of {came} came where those of {name} were expected")
            whole = nn.Parameter(value.to(device=device, dtype=dtype))
            del value
        whole.requires_grad_(old.requires_grad)  # what is frozen stays so
        replace_parameter(module, prefix + name, whole)
        compat.zero3_partition(whole, first, dict(config))
        first = first if first is not None else whole
    for parameter in module.parameters():
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(device=device, dtype=dtype)
            compat.zero3_partition(parameter, first, dict(config))


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Of the parameters that DeepSpeed trains with these settings; its masters are float32."""
    for section, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(section, {}).get("enabled"):
            return dtype
    return torch.float32
