"""``dualroute doctor``: can this machine, or these machines, train?  One verdict a line.

Alone it looks at this machine and lets two local processes talk; under ``torchrun``, ``srun`` or
``deepspeed`` (launch/doctor.py) at all ranks together.  Exit status 1 when a line says FAIL.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dualroute.attention.verification import Decision
from dualroute.doctor import kernels, machine, network
from dualroute.doctor.config import DoctorConfig
from dualroute.doctor.smoke import smoke
from dualroute.doctor.verdict import Verdict, guarded
from dualroute.training.parallel.environment import World, detect_world


def verdicts(config: DoctorConfig, world: World, table: dict[str, Decision]) -> Iterator[Verdict]:
    """Every check, in the order in which the next one would make sense; ``table`` gets figures of kernels."""
    output = Path(config.output)
    if world.rank == 0:
        yield from guarded("versions", machine.versions)
        yield from guarded("devices", machine.devices)
        yield from guarded("memory", machine.memory)
        yield from guarded("disk", partial(machine.disk, output, config.disk_mib))
        yield from guarded("attention", machine.attention_kernels)
        yield from guarded("ops", machine.deepspeed_ops)
    yield from guarded("network", partial(network.together, world, output, config.network_mib))
    if world.rank == 0 and config.kernels:
        yield from guarded("kernels", partial(kernels.kernels, table))
    if world.rank == 0 and config.smoke:
        yield from guarded("smoke", smoke)


def doctor(config: DoctorConfig) -> int:
    """Print the verdicts; the exit status is 1 when one of them is FAIL."""
    world = detect_world()
    failed = False
    table: dict[str, Decision] = {}
    for verdict in verdicts(config, world, table):
        failed = failed or verdict.level == "FAIL"
        if world.rank == 0 or verdict.level == "FAIL":
            where = f"rank {world.rank}: " if world.rank else ""
            print(f"{where}{verdict}", flush=True)
    kernels.show(table)
    return 1 if failed else 0
