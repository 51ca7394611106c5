"""What depends on the device: how much is worked on at once, and what only a CPU does well.

In: a device. Out: sizes. On a CPU a tile should stay in the caches of a core. A GPU wants few and large
launches, and takes the memory for them.
"""

from __future__ import annotations

import torch

LARGER = 32  # times as much at once as on a CPU


def is_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def at_once(on_cpu: int, device: torch.device) -> int:
    """A budget of work for one launch, given that for a CPU."""
    return on_cpu if is_cpu(device) else on_cpu * LARGER


def least_ranges(device: torch.device) -> int:
    """Ranges that a document's query blocks are cut into at least; few mean few launches."""
    return 16 if is_cpu(device) else 4
