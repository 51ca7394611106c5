"""What two ranks do that see different things; each prints what it came to.  See test_agreement.py."""

import os
from datetime import timedelta

import torch.distributed as dist

from dualroute.errors import UserError
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


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = int(os.environ["RANK"])
    found = [
        outcome(lambda: decided_by_rank_zero(lambda: decide(["zero", "one"][rank]))),
        outcome(lambda: decided_by_rank_zero(lambda: decide([None, "one"][rank]))),
        outcome(lambda: all_succeed(lambda: fail_on(1))),
        outcome(lambda: all_succeed(lambda: fail_on(7))),
    ]
    print(found, flush=True)
    dist.destroy_process_group()
