"""Dumps of torch's flight recorder as NCCL ranks write them (format 2.10), one per rank and situation."""

from __future__ import annotations

from typing import Any

GATHER = "_all_gather_base"
Call = tuple[str, str, int, str]  # group, operation, first size, state: completed, started or scheduled


def dump(calls: list[Call], groups: dict[str, list[int]], *, first: int = 1) -> dict[str, Any]:
    """What ``torch._C._distributed_c10d._dump_nccl_trace_json`` gives on one rank.

    Args:
        calls: In the order in which the rank has made them.
        groups: Members by name; "0" is the default group.
        first: Number of the first call on each group, where older ones have left the buffer.
    """
    numbers = dict.fromkeys(groups, first - 1)
    identifiers = {name: number for number, name in enumerate(groups)}  # the rank's own count
    status: dict[str, dict[str, str]] = {}
    entries = []
    for record, (group, operation, size, state) in enumerate(calls):
        numbers[group] += 1
        over = state == "completed"
        before = {f"last_{what}_collective": str(first - 1) for what in ("enqueued", "completed")}
        mine = status.setdefault(str(identifiers[group]), {**before, "last_started_collective": "-1"})
        mine["last_enqueued_collective"] = str(numbers[group])
        if over:
            mine["last_completed_collective"] = str(numbers[group])
        entries.append(
            {
                "record_id": record,
                "pg_id": identifiers[group],
                "process_group": [group, "default_pg" if group == "0" else "undefined"],
                "collective_seq_id": numbers[group],
                "p2p_seq_id": 0,
                "op_id": numbers[group],
                "profiling_name": f"nccl:{operation}",
                "time_created_ns": 1_700_000_000_000_000_000 + record,
                "input_sizes": [[size]],
                "input_dtypes": ["BFloat16"],
                "output_sizes": [[_output(operation, size, len(groups[group]))]],
                "output_dtypes": ["BFloat16"],
                "state": state,
                "time_discovered_started_ns": 0 if state == "scheduled" else 1_700_000_000_100_000_000,
                "time_discovered_completed_ns": 1_700_000_000_200_000_000 if over else 0,
                "retired": over,
                "timeout_ms": 1_800_000,
                "is_p2p": False,
                "thread_id": "140349526064000",
                "thread_name": "python",
            }
        )
    return {
        "version": "2.10",
        "comm_lib_version": "2.27.5",
        "nccl_comm_state": {},
        "pg_config": {
            name: {"name": name, "desc": "default_pg" if name == "0" else "undefined", "ranks": str(members)}
            for name, members in groups.items()
        },
        "pg_status": status,
        "entries": entries,
    }


def _output(operation: str, size: int, ranks: int) -> int:
    return {"_all_gather_base": size * ranks, "_reduce_scatter_base": size // ranks}.get(operation, size)


def step(last: str, *, size: int = 4096, group: str = "0", operation: str = "_all_gather_base") -> list[Call]:
    """Two finished collectives and a third in state ``last``; "" leaves the third out."""
    calls: list[Call] = [
        ("0", "_all_gather_base", 4096, "completed"),
        ("0", "_reduce_scatter_base", 512, "completed"),
    ]
    return [*calls, (group, operation, size, last)] if last else calls


#: a group of four and two of pairs, as each of the ranks knows them
PAIRS = {rank: {"0": [0, 1, 2, 3], str(1 + rank // 2): [rank & 2, rank | 1]} for rank in range(4)}


def of_ranks(last: str, odd: dict[int, dict[str, Any]], first: int = 1) -> dict[int, dict[str, Any]]:
    """Four ranks whose third collective is in state ``last``, but for what ``odd`` says of some."""
    return {
        rank: dump(step(**{"last": last, **odd.get(rank, {})}), PAIRS[rank], first=first) for rank in range(4)
    }


#: four ranks each, and what must be said
SITUATIONS: dict[str, tuple[dict[int, dict[str, Any]], list[str]]] = {
    "one has not come": (
        of_ranks("scheduled", {2: {"last": ""}}),
        [
            "rank 2 (host a",
            "slow or stuck in forward of step 5",
            "; ranks 0-1, 3 wait in _all_gather_base, number 3 of group 0 (in forward of step 5)",
        ],
    ),
    # 3 waits for 2 in their pair, 2 has gone on to the whole group, to which 3 has not come
    "a circle": (
        of_ranks("scheduled", {3: {"group": "2"}}),
        [
            f"ranks wait for each other in different collectives: rank 2 has not come to {GATHER}, number 1 "
            f"of group 2, in which rank 3 waits: it has started 0 there and waits in {GATHER}, number 3 of "
            f"group 0",
            f"rank 3 has not come to {GATHER}, number 3 of group 0, in which ranks 0-2 wait",
        ],
    ),
    # the pair of 2 and 3 does not get through, and the others wait for it
    "a chain": (
        of_ranks("scheduled", {2: {"group": "2"}, 3: {"group": "2"}}),
        [
            f"rank 2 has not come to {GATHER}, number 3 of group 0, in which ranks 0-1 wait: it has "
            f"started 2 there and waits in {GATHER}, number 1 of group 2",
            "rank 3 has not come",
        ],
    ),
    "another call": (
        of_ranks("scheduled", {1: {"operation": "all_reduce"}}),
        [f"rank 1 calls all_reduce of [[4096]] as number 3 of group 0, where the others call {GATHER} of"],
    ),
    "other sizes": (
        of_ranks("scheduled", {0: {"size": 17}}),
        ["rank 0 calls _all_gather_base of [[17]] as number 3 of group 0"],
    ),
    # which is how Ulysses may divide a text: nobody is to blame for it
    "other sizes that may be": (
        of_ranks(
            "started", {rank: {"size": 17 if rank else 18, "operation": "all_to_all"} for rank in range(4)}
        ),
        ["all ranks wait in all_to_all, number 3 of group 0", "the connection between them"],
    ),
    "a device that hangs": (
        of_ranks("started", {3: {"last": "scheduled"}}, first=900),
        [f"on rank 3 the device has not begun {GATHER}, number 902 of group 0, which runs on the others"],
    ),
    "the connection": (
        of_ranks("started", {}),
        ["all ranks wait in _all_gather_base, number 3 of group 0", "the connection between them"],
    ),
}
