"""Launchers that people use, as the words between ``python`` and a script; and a port for their ranks."""

from __future__ import annotations

import socket


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def deepspeed(ranks: int) -> list[str]:
    return ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--master_port", free_port()]


def torchrun(ranks: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", free_port()]
