"""Who is missing from a collective, by torch's flight recorder, where no Python stack can tell.

- In: the dump of each rank's recorder (:func:`~dualroute.compat.flight_records`): the last collectives of
  every process group, how far each group has come.
- Here: :func:`summary` keeps of it what a heartbeat can carry; :func:`verdict` compares those of all ranks.
- Next: ``training/resilience/stall_report.py`` makes the line of it.

On NCCL a collective only puts work on the GPU's queue.  The main thread goes on and waits later, in a
``.item()`` or a copy, so on every rank it stands at the same innocent place.  The recorder counts the
collectives of each group: a rank whose count is below the one that others wait in has not come to it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

#: Members of a group that a heartbeat names; of a larger one it says nothing, which reads "all ranks".
MOST_MEMBERS = 512
#: Operations that want the same sizes on all ranks; those of an all_to_all, say, may differ.
_ALIKE = ("all_reduce", "_all_gather_base", "_reduce_scatter_base", "broadcast")
#: Ranks and causes that the line names one by one.
MOST_NAMED = 8


def ranks(numbers: Iterable[int], most: int = 2 * MOST_NAMED) -> str:
    """[0, 2, 3, 4] as "ranks 0, 2-4"; of more than ``most`` such runs the first, and how many follow."""
    numbers = sorted(numbers)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:most])
    left = sum(b - a + 1 for a, b in runs[most:])
    return f"rank{'s' if len(numbers) > 1 else ''} {text}" + (f" and {left} more" if left else "")


def summary(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of dumps in torch's format what says where this rank stands, as plain values for JSON.

    Returns:
        ``groups``: by name [collectives enqueued, completed, members or None]; ``waits``: of the oldest
        collective that is not over [group, its number, operation, sizes, whether it has begun], or None.
        Empty where nothing was recorded.  A dump of another format gives what can be read of it.
    """
    for record in records:
        entries = [entry for entry in record.get("entries") or [] if isinstance(entry, dict)]
        if entries:
            return _of_entries(record, entries)
    return {}


def _of_entries(record: Mapping[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    # groups are numbered by each process for itself; their names are the same on all ranks
    names = {str(entry.get("pg_id")): _group(entry) for entry in entries}
    groups: dict[str, list[Any]] = {}
    for number, status in (record.get("pg_status") or {}).items():
        if number in names:
            enqueued, completed = (
                int(status.get(f"last_{what}_collective", -1)) for what in ("enqueued", "completed")
            )
            groups[names[number]] = [enqueued, completed, _members(record, names[number])]
    if len(groups) == len(record.get("pg_status") or {}):
        # a group of which there is no status has not been used; were one unnamed, it might be that
        for name in record.get("pg_config") or {}:
            groups.setdefault(name, [0, 0, _members(record, name)])
    waits = None
    for entry in sorted(entries, key=lambda entry: int(entry.get("record_id", 0))):
        over = entry.get("retired") or entry.get("state") == "completed"
        if not over and not entry.get("is_p2p"):
            operation = str(entry.get("profiling_name", "a collective")).rpartition(":")[2]
            number, sizes = int(entry.get("collective_seq_id", -1)), str(entry.get("input_sizes", ""))[:80]
            waits = [_group(entry), number, operation, sizes, entry.get("state") == "started"]
            break
    return {"groups": groups, "waits": waits}


def _group(entry: Mapping[str, Any]) -> str:
    name = entry.get("process_group") or ["?"]
    return str(name[0] if isinstance(name, list) else name)


def _members(record: Mapping[str, Any], group: str) -> list[int] | None:
    try:
        members = [int(rank) for rank in json.loads(record["pg_config"][group]["ranks"])]
    except (KeyError, TypeError, ValueError):
        return None
    return members if 0 < len(members) <= MOST_MEMBERS else None


def waiting_text(flight: Mapping[str, Any]) -> str:
    """What the rank waits in, "all_reduce, number 57 of group 0"; "" where nothing is under way."""
    waits = flight.get("waits")
    return f"{waits[2]}, number {waits[1]} of group {waits[0]}" if waits else ""


def verdict(flights: Mapping[int, Mapping[str, Any]]) -> str:
    """Why ranks that all wait do so; "" where their records do not say.

    Args:
        flights: :func:`summary` of each rank that has one.
    """
    waiting = {rank: flight["waits"] for rank, flight in flights.items() if flight.get("waits")}
    behind = {
        rank: [
            other for other in _peers(flights, rank, waits[0]) if _count(flights[other], waits[0]) < waits[1]
        ]
        for rank, waits in waiting.items()
    }
    missing = sorted({other for others in behind.values() for other in others})
    if missing:
        # one that is itself kept waiting by a third is no cause; in a circle all are
        causes = [rank for rank in missing if not behind.get(rank)]
        return _not_come(flights, behind, causes or missing, circle=not causes)
    return _other_call(waiting) or _not_begun(waiting)


def _peers(flights: Mapping[int, Mapping[str, Any]], rank: int, group: str) -> list[int]:
    members = flights[rank]["groups"].get(group, [0, 0, None])[2]
    return [
        other
        for other in (flights if members is None else members)
        if other != rank and group in flights.get(other, {}).get("groups", {})
    ]


def _count(flight: Mapping[str, Any], group: str) -> int:
    return int(flight["groups"][group][0])


def _not_come(
    flights: Mapping[int, Mapping[str, Any]],
    behind: Mapping[int, list[int]],
    causes: list[int],
    *,
    circle: bool,
) -> str:
    parts = []
    for cause in causes[:MOST_NAMED]:
        victims = [rank for rank, others in behind.items() if cause in others]
        group, number, operation, *_ = flights[victims[0]]["waits"]
        own = waiting_text(flights[cause])
        parts.append(
            f"rank {cause} has not come to {operation}, number {number} of group {group}, in which "
            f"{ranks(victims)} {'wait' if len(victims) > 1 else 'waits'}: it has started "
            f"{_count(flights[cause], group)} there" + (f" and waits in {own}" if own else "")
        )
    more = f"; and so have {len(causes) - MOST_NAMED} more ranks" if len(causes) > MOST_NAMED else ""
    head = "ranks wait for each other in different collectives: " if circle else ""
    return head + "; ".join(parts) + more


def _other_call(waiting: Mapping[int, list[Any]]) -> str:
    """Ranks that call something else, or with other sizes, where most call one thing."""
    for place in {(waits[0], waits[1]) for waits in waiting.values()}:
        calls = {
            rank: f"{waits[2]} of {waits[3]}" if waits[2] in _ALIKE else str(waits[2])
            for rank, waits in waiting.items()
            if (waits[0], waits[1]) == place
        }
        usual, _ = Counter(calls.values()).most_common(1)[0]
        others = {rank: call for rank, call in calls.items() if call != usual}
        if others:
            kinds = sorted(set(others.values()))[:MOST_NAMED]
            return (
                f"{ranks(others)} {'call' if len(others) > 1 else 'calls'} {', '.join(kinds)} as number "
                f"{place[1]} of group {place[0]}, where the others call {usual}"
            )
    return ""


def _not_begun(waiting: Mapping[int, list[Any]]) -> str:
    """All have enqueued it, on some GPUs it has not begun; told only by ``TORCH_NCCL_ENABLE_TIMING=1``."""
    for place in {(waits[0], waits[1]) for waits in waiting.values()}:
        here = {rank: waits for rank, waits in waiting.items() if (waits[0], waits[1]) == place}
        late = [rank for rank, waits in here.items() if not waits[4]]
        if late and len(late) < len(here):
            operation = here[late[0]][2]
            return (
                f"on {ranks(late)} the device has not begun {operation}, number {place[1]} of group "
                f"{place[0]}, which runs on the others: what was launched there before it does not end"
            )
    return ""
