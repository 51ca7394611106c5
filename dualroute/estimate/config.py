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
        mfu: Assumed: share of the peak at which the arithmetic runs, what is computed again included; what is
            waited for comes on top of it.  A short run says what yours comes to in all (`speed/mfu`).
        launches_forward: Assumed: kernels that one layer launches in its forward pass.
        launches_backward: The same in its backward pass.
        launch_microseconds: Assumed: time of the host for one launch.
        gpus_per_node: GPUs that node_bandwidth connects.
        node_bandwidth: Assumed: GB/s that one GPU sends to others of its node (NVLink, H100: 450 at most).
        network_bandwidth: Assumed: GB/s that one GPU sends to other nodes (400 Gbit/s a GPU: 50 at most).
        overlap: Assumed: share of the time of the arithmetic in which gradients and weights can travel.
        storage_bandwidth: Assumed: GB/s that the file system takes from all ranks together.
        rank_bandwidth: Assumed: GB/s that one process writes and hashes.
    """

    gpus: int = 1
    gpu_memory: float = 80.0
    headroom: float = 0.15
    peak_tflops: float = 989.0
    mfu: float = 0.35
    launches_forward: int = 60
    launches_backward: int = 90
    launch_microseconds: float = 5.0
    gpus_per_node: int = 8
    node_bandwidth: float = 300.0
    network_bandwidth: float = 40.0
    overlap: float = 0.5
    storage_bandwidth: float = 50.0
    rank_bandwidth: float = 1.5

    def __post_init__(self) -> None:
        ranges = {
            "gpus": at_least(1, 2**24),
            "gpu_memory": above(0),
            "headroom": Range(0, 1, without_most=True),
            "peak_tflops": above(0),
            "mfu": above(0, 1),
            **dict.fromkeys(("launches_forward", "launches_backward"), at_least(0, 10**6)),
            "launch_microseconds": at_least(0, 1e6),
            "gpus_per_node": at_least(1, 2**20),
            **dict.fromkeys(
                ("node_bandwidth", "network_bandwidth", "storage_bandwidth", "rank_bandwidth"), above(0)
            ),
            "overlap": at_least(0, 1),
            "seed": SEEDS,
        }
        check_fields(self, "", ranges)
