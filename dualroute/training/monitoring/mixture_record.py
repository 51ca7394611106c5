"""``RUN/mixture.jsonl``: one line for each stage of a run's mixture, since when it is planned, by whom begun.

In: the stages of this start. Here: lines that the run has already stay as they are, with the time and step at
which they were written; a stage that was planned and is not any more goes. Out: the file, at the moment at
which a start may change the run folder.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualroute.errors import UserError
from dualroute.files import read_limited, write_bytes_atomically
from dualroute.model.checkpoint.folder import Checkpoint

log = logging.getLogger(__name__)

FILE = "mixture.jsonl"
_MOST_BYTES = 64 << 20


def read_stages(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's file, none where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = output / FILE
    if not path.exists():
        return []
    try:
        lines = [json.loads(line) for line in read_limited(path, _MOST_BYTES).decode().splitlines()]
        if not all(isinstance(line, dict) and isinstance(line.get("from_sample"), int) for line in lines):
            raise ValueError("a line is no stage")
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): restore it, or remove it to have it written anew"
        ) from error
    return lines


def write_stages(output: Path, stages: Sequence[dict[str, Any]], resumed: Checkpoint | None) -> None:
    """Write the stages of this start, and say which are new to the run.

    Args:
        stages: tables with ``from_sample``, ``from_tokens``, ``weights`` and ``sources``; none: no file.
        resumed: what the run goes on from.
    """
    if not stages:
        return
    known = {_content(line): line for line in read_stages(output)}
    step = 0 if resumed is None else resumed.step
    lines = []
    for stage in stages:
        line = known.get(_content(stage))
        if line is None:
            line = {**stage, "written_at_step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            if known:
                shares = ", ".join(f"{name} {share:.4g}" for name, share in stage["weights"].items())
                log.info("%s", f"new stage of the mixture from token {stage['from_tokens']:,} on: {shares}")
        lines.append(line)
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    write_bytes_atomically(output / FILE, text.encode())


def _content(line: dict[str, Any]) -> str:
    """What makes two lines the same stage, wherever the folders lie."""
    sources = line.get("sources")
    folders = sources.values() if isinstance(sources, dict) else ()
    found = [one.get("fingerprint") for one in folders if isinstance(one, dict)]
    return json.dumps([line["from_sample"], line.get("weights"), sorted(map(str, found))], sort_keys=True)
