"""What `kernels: auto` stands for on a GPU: compared on the models of this process, once, and remembered.

In: models, the device and type that they run in, how long their texts are.  Here: the back ends are compared
(:mod:`dualroute.attention.verification`), or the comparison is found in the user's cache.  Out:
:func:`dualroute.attention.backend.decide` knows, and its `describe` says in a line which and why.

A file of the cache is called kernels-KEY.json.  The key is of everything that could change the answer: the
device, its driver, torch, Triton, the sources of the attention, the shapes.  A file that is damaged, or not
what we write, is as good as none: a line says so, and the comparison is made again.

On a CPU nothing is compared at the start of a run: the C++ kernels are compiled from this source by the
machine's own compiler, and ``dualroute doctor`` compares them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dualroute.attention import backend
from dualroute.attention.backends.cpp.build import cache_folders
from dualroute.attention.verification import Decision, DeviceLost, Finding, Problem, decide, left_to_torch
from dualroute.errors import UserError
from dualroute.files import read_json, write_bytes_atomically

log = logging.getLogger(__name__)

#: Types of devices on which auto waits for a comparison.
COMPARED = ("cuda",)
LARGEST = 2**18  # bytes of a file of the cache; ours have about a thousand
KEPT = 64  # files of the cache
FORMAT = 1
#: Back ends that were compared in this process, the last one perhaps at the moment.
in_turn: list[str] = []


def choose_kernels(
    problems: Sequence[Problem],
    device: torch.device,
    agree: Callable[[Callable[[], tuple[str, str]]], tuple[str, str]] = lambda find: find(),
) -> str | None:
    """Let auto stand for the fastest kernels that are right, where it was asked for and not decided yet.

    Args:
        problems: What the layers of all models of this process ask, see `problems_of`.
        agree: Calls what it gets on one rank and gives all of them the result: ranks run the same kernels.

    Returns:
        The line that says which and why; None where there was nothing to decide.

    Raises:
        UserError: Kernels broke the device, or one rank does not have what another one has chosen.
    """
    if device.type not in COMPARED or not problems:
        return None
    if not backend.is_open(device):
        _name_gaps(problems, device)
        return None
    name, line = agree(lambda: _found(problems, device))
    try:
        backend.decide(device.type, name, line)
    except ValueError as error:
        raise UserError(
            f"train.kernels auto: rank 0 has found {name} to be the fastest, which cannot be had here "
            f"({error}): install the same packages on all nodes, or give train.kernels torch"
        ) from error
    return line


def _name_gaps(problems: Sequence[Problem], device: torch.device) -> None:
    """Say what kernels that were asked for by name leave to plain torch."""
    name = backend.wanted()
    if name in ("auto", "torch"):
        return
    try:
        left = left_to_torch(backend.load(name), problems, device)
    except ValueError as error:
        log.warning("%s", f"attention: plain torch, since there are no {name} kernels here: {error}")
        return
    if left is None:
        log.warning("%s", f"attention: the {name} kernels take nothing of this model: plain torch does")
    elif left:
        log.warning("%s", f"attention: plain torch, and not the {name} kernels, takes {', '.join(left)}")


def _found(problems: Sequence[Problem], device: torch.device) -> tuple[str, str]:
    decision = compared(problems, device)
    for finding in decision.findings:
        if finding.why_not.startswith("WRONG"):
            log.warning("%s", f"attention: the {finding.name} kernels are not used: {finding.why_not}")
    return decision.name, decision.line()


def compared(problems: Sequence[Problem], device: torch.device, *, fresh: bool = False) -> Decision:
    """The decision for these problems: from the cache, unless it is to be ``fresh``, or made and kept there.

    Raises:
        UserError: Kernels have left the device unusable for this process.
    """
    key = cache_key(problems, device)
    known = None if fresh else _read(key)
    if known is not None:
        return known
    try:
        decision = decide(problems, device, tell=in_turn.append)
    except DeviceLost as error:
        name, how = error.args
        raise UserError(
            f"the {name} kernels have left {device} unusable for this process ({how}): choose others, "
            f"for example {backend.VARIABLE}=torch, and report it"
        ) from error
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)  # the run's own peak is what a monitor reports
    # what has failed once may work the next time
    if not any(finding.raised for finding in decision.findings):
        _write(key, decision)
    return decision


def cache_key(problems: Iterable[Problem], device: torch.device) -> str:
    """Of everything that could change the answer."""
    told = (FORMAT, *_machine(device), _sources(), sorted(repr(problem) for problem in problems))
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


def _machine(device: torch.device) -> list[str]:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return [name, nvidia_driver() or "none", torch.__version__, str(torch.version.cuda), triton]


def nvidia_driver() -> str | None:
    """Version of the loaded kernel driver."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    words = line.split("Kernel Module")[-1].split()
    return next((word for word in words if word[0].isdigit()), line)


@functools.cache
def _sources() -> str:
    """Of all files of the attention: other kernels are another question."""
    digest = hashlib.sha256()
    folder = Path(backend.__file__).parent
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".h", ".cpp"):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _files(key: str) -> list[Path]:
    """Where the file may lie, the best place first."""
    return [folder / f"kernels-{key}.json" for folder in cache_folders([])]


def _read(key: str) -> Decision | None:
    for path in _files(key):
        try:
            found = _decision(read_json(path, limit=LARGEST))
        except FileNotFoundError:
            continue
        except (UserError, TypeError, ValueError, KeyError) as error:
            log.warning("%s", f"{path} is ignored, and kernels are compared again: {error}")
            continue
        return found
    return None


def _decision(content: Any) -> Decision:
    """What `_write` has written.

    Raises:
        TypeError, ValueError, KeyError: It is not that.
    """
    body = content["decision"]
    if content["sha256"] != _checksum(body):
        raise ValueError("its checksum does not fit")
    findings = []
    for values in body["findings"]:
        finding = Finding(**{**values, "left_to_torch": tuple(map(str, values["left_to_torch"]))})
        spent = finding.milliseconds
        if finding.name not in backend.CHOICES[1:] or not (spent is None or math.isfinite(spent)):
            raise ValueError(f"there is no back end {finding.name} of {spent} ms")
        findings.append(finding)
    if body["name"] not in {finding.name for finding in findings}:
        raise ValueError(f"nothing was found of {body['name']}")
    return Decision(body["name"], tuple(findings))


def _checksum(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write(key: str, decision: Decision) -> None:
    """Keep it; a cache that cannot be written costs a line, and the comparison at the next start."""
    body = json.loads(json.dumps(dataclasses.asdict(decision)))
    text = json.dumps({"decision": body, "sha256": _checksum(body)}, indent=1)
    reasons = []
    for path in _files(key):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomically(path, text.encode())
            _tidy(path.parent)
        except OSError as error:
            reasons.append(f"{path.parent}: {error.strerror or error}")
            continue
        return
    log.warning(
        "%s", f"the comparison of kernels is not kept ({'; '.join(reasons)}): the next start repeats it"
    )


def _tidy(folder: Path) -> None:
    files = sorted(folder.glob("kernels-*.json"), key=lambda path: -path.stat().st_mtime)
    for path in files[KEPT:]:
        path.unlink(missing_ok=True)
