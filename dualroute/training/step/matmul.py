"""How float32 matrices are multiplied: a setting of torch for the whole process, chosen once a run.

In: ``train.float32_matmul_precision`` and ``train.precision``.  Here: :func:`set_matmul_precision`.  Next:
all products whose operands are float32, which under bf16-mixed are those outside of autocast.

TF32 keeps 11 bits of a factor and bfloat16 8, so that in a run of 16 bits it is not what rounds most; without
it, float32 products run outside of the tensor cores.
"""

from __future__ import annotations

import torch

from dualroute.training.config import TrainConfig


def set_matmul_precision(train: TrainConfig, *, on_cuda: bool) -> str:
    """Set it for this process; what it was set to: highest, high or medium."""
    chosen: str = train.float32_matmul_precision
    if chosen == "auto":
        chosen = "high" if on_cuda and train.precision != "32" else "highest"
    torch.set_float32_matmul_precision(chosen)
    return chosen
