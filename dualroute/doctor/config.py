"""The options of ``dualroute doctor``.  No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from dualroute.paths import LocalPath
from dualroute.settings import at_least, check_fields


@dataclass
class DoctorConfig:
    """Examine machine and ranks before a run is booked.

    Args:
        output: Folder that runs will be written to; its room and speed are measured.
        kernels: Also compare the kernels of the attention, values, gradients and speed, on the shapes of the
            recipes in configs/pretrain (seconds on a GPU, half a minute on a CPU).
        smoke: Also train 20 steps on a small text (about half a minute on a CPU).
        disk_mib: Size of the file that the disk is measured with.
        network_mib: Size of the tensor that pairs of ranks are measured with.
    """

    output: LocalPath = "runs"
    kernels: bool = True
    smoke: bool = True
    disk_mib: int = 256
    network_mib: int = 64

    def __post_init__(self) -> None:
        check_fields(self, "", {"disk_mib": at_least(1, 2**20), "network_mib": at_least(1, 2**14)})
