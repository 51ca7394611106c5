"""What two ranks do that see different things; each prints what it came to.  See test_agreement.py."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from dualroute.attention import DualRouting, backend
from dualroute.attention.verification import Decision, Finding, problems_of
from dualroute.errors import UserError
from dualroute.model import kernel_choice
from dualroute.training.parallel.agreement import all_succeed, decided_by_rank_zero


def outcome(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def fail_on(rank):
    if dist.get_rank() == rank:
        raise UserError(f"seen by {rank}")


def decide(value):
    if value is None:
        raise UserError("refused")
    return value


def kernels(rank):
    """What auto stands for on a rank whose own comparison comes to something else than that of rank 0."""
    kernel_choice.COMPARED = ("cpu",)
    name = ["torch", "triton"][rank]
    kernel_choice.compared = lambda problems, device: Decision(name, (Finding(name, 1.0 + rank),))
    problems = problems_of(DualRouting(16, 2), torch.float32, 64, packed=True)
    kernel_choice.choose_kernels(problems, torch.device("cpu"), decided_by_rank_zero)
    return backend.describe("cpu").partition(",")[0]


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = int(os.environ["RANK"])
    found = [
        outcome(lambda: decided_by_rank_zero(lambda: decide(["zero", "one"][rank]))),
        outcome(lambda: decided_by_rank_zero(lambda: decide([None, "one"][rank]))),
        outcome(lambda: all_succeed(lambda: fail_on(1))),
        outcome(lambda: all_succeed(lambda: fail_on(7))),
        outcome(lambda: kernels(rank)),
    ]
    print(found, flush=True)
    dist.destroy_process_group()
