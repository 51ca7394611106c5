"""The options of ``dualroute estimate``.  No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from dualroute.settings import SEEDS, Range, above, at_least, check_fields
from dualroute.training.config import PretrainConfig


@dataclass
class EstimateConfig(PretrainConfig):
    """Estimate a run from its configuration, which may be one of configs/pretrain.

    Args:
        gpus: GPUs, one process each.
        gpu_memory: Memory of one, GiB.
        headroom: Share of that memory left to buffers, fragmentation and tiles in flight.
        peak_tflops: Dense bfloat16 peak of one GPU (H100 SXM: 989, A100: 312).
        mfu: Share of the peak that training reaches; measure yours with a short run (`speed/mfu`).
    """

    gpus: int = 1
    gpu_memory: float = 80.0
    headroom: float = 0.15
    peak_tflops: float = 989.0
    mfu: float = 0.35

    def __post_init__(self) -> None:
        ranges = {
            "gpus": at_least(1, 2**24),
            "gpu_memory": above(0),
            "headroom": Range(0, 1, without_most=True),
            "peak_tflops": above(0),
            "mfu": above(0, 1),
            "seed": SEEDS,
        }
        check_fields(self, "", ranges)
