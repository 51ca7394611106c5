"""What ranks can do with each other: versions alike, clocks alike, a shared folder, all-reduce speed.

- In: a process group (:func:`together`): the launcher's, or two gloo processes of this machine.
- Here: :func:`examine` runs on every rank, in the same order, and answers on rank 0.
- Next: ``dualroute/doctor/command.py`` prints the verdicts.

Pairs are measured one after the other while everybody else waits.  All at once would be
quicker and would measure the switch instead of finding the one bad cable.
"""

from __future__ import annotations

import itertools
import os
import platform
import socket
import statistics
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dualroute.doctor.machine import MIB, installed
from dualroute.doctor.verdict import Verdict, fail, ok, warn
from dualroute.training.parallel.environment import DualRouteEnvironment, World

_MOST_PAIRS = 64
_TIMEOUT = timedelta(minutes=5)


def together(world: World, output: Path, mebibytes: int) -> list[Verdict]:
    """Examine the launcher's ranks; alone, two processes of this machine.  Verdicts on rank 0 only."""
    if world.world_size > 1:
        environment = DualRouteEnvironment(world)
        return examine(
            world.rank,
            world.world_size,
            f"tcp://{environment.main_address}:{environment.main_port}",
            world.local_rank,
            output,
            mebibytes,
        )
    return _two_local_processes(output, mebibytes)


def _two_local_processes(output: Path, mebibytes: int) -> list[Verdict]:
    context = get_context("spawn")
    answers: Any = context.Queue()
    address = f"tcp://127.0.0.1:{DualRouteEnvironment(World()).main_port}"
    processes = [
        context.Process(target=_answer, args=(answers, rank, address, output, mebibytes), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        found: list[Verdict] = answers.get(timeout=180)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return found


def _answer(answers: Any, rank: int, address: str, output: Path, mebibytes: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two processes on one GPU are no network
    torch.set_num_threads(1)
    try:
        found = examine(rank, 2, address, rank, output, mebibytes)
    except Exception as error:
        found = [
            fail("network", f"{type(error).__name__}: {error}", "look at the firewall of this machine's lo")
        ]
    if rank == 0:
        answers.put(found)


def examine(
    rank: int, world_size: int, address: str, local_rank: int, output: Path, mebibytes: int
) -> list[Verdict]:
    """All checks among ranks, on every rank alike; the verdicts are complete on rank 0."""
    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.is_available():
        backend, device = "nccl", torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if address.startswith("tcp") and "TORCHELASTIC_RUN_ID" in os.environ:
        address = "env://"  # torchrun serves the store itself
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    try:
        found = [*_alike(rank, world_size)]
        found += _clocks(rank, world_size, device)
        found += _shared(rank, output)
        found += _bandwidth(rank, world_size, device, mebibytes)
        return found
    finally:
        dist.destroy_process_group()


def _alike(rank: int, world_size: int) -> Iterator[Verdict]:
    """Every rank has the same software; who is there."""
    mine = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "lightning", "deepspeed", "dualroute")},
    }
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, mine)
    hosts = sorted({they["host"] for they in everyone})
    yield ok("ranks", f"{world_size} on {len(hosts)} host(s): {', '.join(hosts[:8])}")
    for name in mine.keys() - {"host"}:
        values = {they[name] for they in everyone}
        if len(values) > 1:
            odd = [f"rank {r} ({they['host']}): {they[name]}" for r, they in enumerate(everyone)][:8]
            yield fail("ranks", f"{name} differs: {'; '.join(odd)}", "use one environment on all nodes")


def _clocks(rank: int, world_size: int, device: torch.device) -> Iterator[Verdict]:
    """Largest difference to rank 0's clock, halving the round trip of the quickest of several exchanges."""
    worst, who = 0.0, 0
    for other in range(1, world_size):
        offset = _offset(rank, other, device)
        if abs(offset) > abs(worst):
            worst, who = offset, other
    if rank != 0:
        return
    found = f"rank {who}'s is {worst * 1000:+.1f} ms from rank 0's" if who else "equal within the exchange"
    if abs(worst) > 1.0:
        yield warn("clocks", found, "logs of nodes cannot be compared: start chrony or ntpd on that node")
    else:
        yield ok("clocks", found)


def _offset(rank: int, other: int, device: torch.device) -> float:
    """Seconds by which ``other``'s clock is ahead of rank 0's; known to rank 0."""
    best, offset = float("inf"), 0.0
    for _ in range(5):
        theirs = torch.zeros(1, dtype=torch.float64, device=device)
        if rank == 0:
            asked = time.time()
            dist.send(theirs, other)
            dist.recv(theirs, other)
            answered = time.time()
            if answered - asked < best:
                best, offset = answered - asked, theirs.item() - (asked + answered) / 2
        elif rank == other:
            dist.recv(theirs, 0)
            theirs.fill_(time.time())
            dist.send(theirs, 0)
    return offset


def _shared(rank: int, output: Path) -> Iterator[Verdict]:
    """A file that rank 0 writes in the output folder is there for every rank."""
    name = [f".doctor-shared-{os.getpid()}"]
    dist.broadcast_object_list(name, 0)
    path = output / name[0]
    if rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        path.touch()
    dist.barrier()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, path.exists())
    if rank == 0:
        path.unlink(missing_ok=True)
    blind = [other for other, sees in enumerate(everyone) if not sees]
    if blind:
        yield fail(
            "output",
            f"rank {blind[0]} does not see {output}",
            "give an --output on a file system of all nodes",
        )


def pairs_of(world_size: int) -> list[tuple[int, int]]:
    """All pairs of few ranks; of many, each rank with its neighbour and with the one half way round."""
    pairs = list(itertools.combinations(range(world_size), 2))
    if len(pairs) <= _MOST_PAIRS:
        return pairs
    near = [(rank, (rank + 1) % world_size) for rank in range(world_size)]
    far = [(rank, rank + world_size // 2) for rank in range(world_size // 2)]
    return sorted({(min(pair), max(pair)) for pair in near + far})


def _bandwidth(rank: int, world_size: int, device: torch.device, mebibytes: int) -> Iterator[Verdict]:
    """Bytes per second that an all-reduce of a pair moves in each direction."""
    pairs = pairs_of(world_size)
    speeds = torch.zeros(len(pairs), dtype=torch.float64, device=device)
    for number, pair in enumerate(pairs):
        group = dist.new_group(list(pair), timeout=_TIMEOUT)
        if rank in pair:
            speed = _all_reduce_speed(group, device, mebibytes)
            speeds[number] = speed if rank == pair[0] else 0.0
        dist.barrier()
        dist.destroy_process_group(group)
    dist.all_reduce(speeds)
    if rank != 0:
        return
    found = speeds.tolist()
    median, slowest = statistics.median(found), min(range(len(pairs)), key=found.__getitem__)
    text = (
        f"all-reduce of {mebibytes} MiB over {len(pairs)} pair(s), {dist.get_backend()}: "
        f"median {median / MIB:,.0f} MiB/s, slowest {found[slowest] / MIB:,.0f} MiB/s "
        f"(ranks {pairs[slowest][0]} and {pairs[slowest][1]})"
    )
    if found[slowest] < median / 2:
        yield warn("bandwidth", text, "that pair is far slower than the others: look at its link or its host")
    elif median < 50 * MIB:
        yield warn("bandwidth", text, "the network is slow: see GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME")
    else:
        yield ok("bandwidth", text)


def _all_reduce_speed(group: Any, device: torch.device, mebibytes: int) -> float:
    tensor = torch.ones(mebibytes * MIB // 4, device=device)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        tensor[0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return mebibytes * MIB / min(seconds[1:])
