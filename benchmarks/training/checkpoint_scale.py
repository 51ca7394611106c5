"""Bytes and estimated seconds that a checkpoint costs each rank, for models and numbers of ranks.

    python benchmarks/training/checkpoint_scale.py [--parameters 7e9 70e9] [--ranks 64 1024] [--zero_stage 3]

Bytes are counted, as the tests count them on ranks that write; seconds follow from the assumed rates, which
the options change.  Nothing is measured here.
"""

from __future__ import annotations

import argparse
import dataclasses

from dualroute.training.checkpointing.cost import Machine, checkpoint_cost

GB = 1e9


def table(parameters: list[float], ranks: list[int], zero_stage: int, machine: Machine) -> str:
    """Markdown; the last column is what one process that hashes all of it would need."""
    lines = [
        "| model | ranks | checkpoint | written and hashed a rank | read a rank at a resume | save | stall, "
        "asynchronous | resume | hashed by one process |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for count in parameters:
        for number in ranks:
            cost = checkpoint_cost(count, number, zero_stage=zero_stage, machine=machine)
            alone = cost.total / machine.hashing
            lines.append(
                f"| {count / GB:g}B | {number:,} | {cost.total / GB:,.0f} GB | {cost.written / GB:.2f} GB | "
                f"{cost.read / GB:.2f} GB | {cost.save_seconds:.1f} s | {cost.stall_seconds:.1f} s | "
                f"{cost.resume_seconds:.1f} s | {alone:,.0f} s |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, nargs="+", default=[7e9, 70e9])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--zero_stage", type=int, choices=range(4), default=3)
    for rate in dataclasses.fields(Machine):
        parser.add_argument(f"--{rate.name}", type=float, default=rate.default, help="bytes a second")
    given = vars(parser.parse_args())
    parameters, ranks, stage = (given.pop(name) for name in ("parameters", "ranks", "zero_stage"))
    print(table(parameters, ranks, stage, Machine(**given)))


if __name__ == "__main__":
    main()
