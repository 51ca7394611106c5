"""Asking Slurm to run a job again: after a stop at a signal, and after a stall or the death of a rank.

- In: Slurm's variables.  :func:`requeue_job` is called by rank zero of a run that saved and stopped
  (``training/resilience/preemption.py``); the program below by the job's script, when the training has
  failed.
- Here: the program tells a stall or a death from an error by what the ranks of this very start wrote last
  (``RUN/heartbeats``), because ``srun`` often reports the status of a rank that it ended itself.
- Next: Slurm runs the same script again, which resumes.

    python -m dualroute.training.resilience.requeue --status $status --limit 3 --output RUN

What is counted are not requeues but stalls since the newest checkpoint.  A run of weeks
may lose a node every day; one that always stops at the same place ends after ``--limit`` more attempts.

Only small modules are imported: it must also work where torch cannot be loaded any more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dualroute.errors import RUN_AGAIN
from dualroute.files import write_bytes_atomically
from dualroute.training.resilience.heartbeat import CUT_OFF, FAILED, RUNNING, Beat, read_beat, this_start

NOT_IN_SLURM = "not a Slurm job"
FILE = "requeues.json"
"""In ``RUN/stalls``: {"job": …, "step": newest checkpoint at the last stall, "stalls": since that one}."""


def requeue_job(environ: Mapping[str, str] | None = None) -> str:
    """Put this process's Slurm job back into the queue.

    Only a batch job that is RUNNING and may be requeued: a cancelled one would be raised from the dead, and
    one that was requeued already would be requeued twice.

    Returns:
        Why it was not done; empty if it was.
    """
    environ = os.environ if environ is None else environ
    if "SLURM_JOB_ID" not in environ:
        return NOT_IN_SLURM
    job = environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environ:  # one task of an array has the array's own number as its job id
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    try:
        shown = _scontrol("--oneliner", "show", "job", job)
        facts = dict(re.findall(r"\b(JobState|Requeue|BatchFlag)=(\S+)", shown.stdout))
        if shown.returncode or not facts:
            return f"scontrol show job {job}: {shown.stderr.strip() or 'no such job'}"
        if facts.get("JobState") != "RUNNING":
            return f"job {job} is {facts.get('JobState')}"
        if facts.get("Requeue") != "1" or facts.get("BatchFlag") == "0":
            return f"job {job} may not be requeued: submit it with sbatch --requeue"
        done = _scontrol("requeue", job)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"job {job} was not requeued: {error}"
    # Slurm obeys by ending the job, scontrol with it
    if done.returncode not in (0, -signal.SIGTERM, -signal.SIGKILL):
        return f"scontrol requeue {job}: {done.stderr.strip()}"
    return ""


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60, check=False)


# -- after a training that failed ----------------------------------------------------------------------------


def stalled(run: Path, status: int, start: str) -> bool:
    """Whether a training of ``run`` that ended with ``status`` stood still, or lost a rank.

    A rank that ends by itself says so in its last heartbeat; one that was killed, or that the watchdog ended,
    did not.  Where a rank was ended from outside (a status above 128), another may have had an error of its
    own before: ``srun`` then ended the rest.

    Args:
        run: The run folder.
        status: Exit status of ``srun``.
        start: :func:`~dualroute.training.resilience.heartbeat.this_start`; what other starts left behind
        says nothing.
    """
    states = [beat.state for beat in _beats(run) if beat.job_start == start]
    lost = RUNNING in states or CUT_OFF in states
    return lost and (status == RUN_AGAIN or (status > 128 and FAILED not in states))


def _beats(run: Path) -> Iterator[Beat]:
    for path in (run / "heartbeats").glob("rank-*.json"):
        beat = read_beat(run, int(path.stem.removeprefix("rank-")))
        if beat is not None:
            yield beat


def count_stall(run: Path, job: str) -> tuple[int, int]:
    """Note one more stall; how many there were since the newest checkpoint, and the step of that one.

    A job of another number begins to count anew: somebody has looked and submitted it again.
    """
    # a folder has this name only when it is whole
    names = [re.fullmatch(r"step-(\d+)", path.name) for path in (run / "checkpoints").glob("step-*")]
    step, before = max((int(name[1]) for name in names if name), default=0), _noted(run)
    stalls = 1
    if before.get("job") == job and step <= before.get("step", -1):
        stalls = before.get("stalls", 0) + 1
    (run / "stalls").mkdir(exist_ok=True)
    text = json.dumps({"job": job, "step": step, "stalls": stalls})
    write_bytes_atomically(run / "stalls" / FILE, text.encode())
    return stalls, step


def _noted(run: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((run / "stalls" / FILE).read_bytes()))
    return {}


def after_failure(run: Path, status: int, limit: int, environ: Mapping[str, str]) -> str:
    """Requeue the job if its training stalled, at most ``limit`` times in a row; what to say of it, or ""."""
    if not stalled(run, status, this_start(environ)):
        return ""
    try:
        stalls, step = count_stall(run, environ.get("SLURM_JOB_ID", ""))
    except OSError as error:
        return f"not requeued after a stall: {error}"
    since = f"since the checkpoint of step {step}" if step else "before the first checkpoint"
    if stalls > limit:
        return (
            f"not requeued: this is stall {stalls} {since}, and --stall_requeues is {limit}; see "
            f"{run / 'stalls'}, then submit it again and it resumes"
        )
    # now, because Slurm ends this process before it returns
    print(f"dualroute: stall {stalls} {since} (limit {limit}): Slurm runs the job again", flush=True)
    refused = requeue_job(environ)
    return f"not requeued after a stall ({refused}); submitted again it resumes" if refused else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """What the job's script calls after a failure; 0 always, the script ends with the training's status."""
    parser = argparse.ArgumentParser(
        prog="python -m dualroute.training.resilience.requeue", description=__doc__
    )
    parser.add_argument("--status", type=int, required=True, help="exit status of the training")
    parser.add_argument("--limit", type=int, required=True, help="requeues without a newer checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="run folder")
    given = parser.parse_args(arguments)
    said = after_failure(given.output, given.status, given.limit, os.environ)
    if said:
        print(f"dualroute: {said}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
