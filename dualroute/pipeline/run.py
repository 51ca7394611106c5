"""``dualroute pipeline``: all stages from text to a model that ships, each done once.

In: the plan of :mod:`~dualroute.pipeline.stages`.  Here: one stage after the other (a training is a process
of its own); a record says from what each output was made.  Out: the outputs, and a report on all of them.

    OUTPUT/stages/NAME.json    arguments, hashes of what was read and written, seconds

A stage whose record matches (same options, same data and checkpoints read, output untouched) is skipped.  One
that was interrupted goes on where its command can; one whose inputs have changed begins anew, and what it had
made is set aside as ``NAME.replaced-1``, not deleted.

The hash of a training's output is that of its newest weights.  Train the parent longer,
and everything made from it is made again, and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from dualroute.data.manifest import MANIFEST_FILE, Manifest
from dualroute.errors import RUN_AGAIN, Interrupted, UserError, printable
from dualroute.files import file_sha256, write_bytes_atomically
from dualroute.model.checkpoint.format import WEIGHTS, find_checkpoint
from dualroute.pipeline.config import PipelineConfig
from dualroute.pipeline.report import write_report
from dualroute.pipeline.stages import PROCESSES, ParseStage, Plan, Planner, Stage

log = logging.getLogger(__name__)


def run_pipeline(
    config: PipelineConfig, parse_stage: ParseStage, run_command: Callable[[list[str]], int]
) -> int:
    """Do what is left to do of a pipeline.

    Args:
        config: The stages and their options.
        parse_stage: Turns a command's arguments into its configuration.
        run_command: Runs a command in this process; returns its exit status.

    Returns:
        The exit status: 0, or that of the stage that failed (75: run the same command again).

    Raises:
        UserError: Options are wrong, or a stage's inputs are missing.
    """
    plan = Planner(config, parse_stage).make()
    for name in [config.from_stage, *(config.only or "").split(",")]:
        if name and name not in [*plan.names(), "report"]:
            raise UserError(f"there is no stage {name}: the stages are {', '.join(plan.names())}, report")
    pipeline = Pipeline(config, plan, run_command)
    if config.dry_run:
        pipeline.show()
        return 0
    with _forwarding_signals() as child:
        for stage in pipeline.chosen():
            status = pipeline.do(stage, child)
            if status:
                log.error(
                    "%s",
                    f"pipeline: stage {stage.name} ended with status {status}; what was done before is kept, "
                    f"the same command goes on from there",
                )
                return status
    if config.only is None or "report" in config.only.split(","):
        page = write_report(config, plan, {s.name: pipeline.record(s) for s in plan.stages})
        log.info("%s", printable(f"report: {page}"))
    return 0


class Pipeline:
    """The stages of a plan, and the records of those that were done."""

    def __init__(self, config: PipelineConfig, plan: Plan, run_command: Callable[[list[str]], int]) -> None:
        self.config, self.plan, self.run_command = config, plan, run_command
        self.records = Path(config.output) / "stages"
        self.launcher = shlex.split(config.launcher) if config.launcher else None
        self.redone = False  # everything after the first stage of --from is done again

    def chosen(self) -> Iterator[Stage]:
        """Those that ``only`` leaves, in order."""
        only = self.config.only.split(",") if self.config.only is not None else self.plan.names()
        return (stage for stage in self.plan.stages if stage.name in only)

    def show(self) -> None:
        """What would be done, as commands."""
        again = False
        console = Console(soft_wrap=True, highlight=False, markup=False)
        for stage in self.chosen():
            again = again or stage.name == self.config.from_stage
            state = "again" if again else self.state(stage)
            command = shlex.join(stage.program(self.launcher)).replace(
                shlex.quote(sys.executable) + " -m ", ""
            )
            console.print(f"# {stage.name}: {state}\n{command}")

    def record(self, stage: Stage) -> dict[str, Any]:
        """What was noted of a stage; empty if it was never begun."""
        path = self.records / f"{stage.name}.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(record, dict) or not isinstance(record.get("reads"), dict):
                raise ValueError("it does not say what was read")
            if record.get("done") and not isinstance(record.get("seconds", 0.0), int | float):
                raise ValueError("seconds is no number")
            return record
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it, and the stage is done again") from error

    def state(self, stage: Stage) -> str:
        """done, interrupted, changed (its inputs or its output), or to do."""
        record = self.record(stage)
        if not record:
            return "to do"
        try:
            reads = self.reads(stage)
        except UserError:  # an input is not there yet
            return "to do"
        if record["reads"] != reads:
            return "changed"
        if not record.get("done"):
            return "interrupted"
        try:
            return "done" if record.get("made") == fingerprint(stage.output) else "changed"
        except UserError:  # removed or damaged
            return "changed"

    def reads(self, stage: Stage) -> dict[str, Any]:
        """All that its output depends on: what files and flags say, wherever they lie, and its inputs."""
        reads: dict[str, Any] = {"options": stage.options or stage.arguments}
        if stage.data is not None:
            reads["data"] = Manifest.load(stage.data).fingerprint
        for folder in stage.checkpoints:
            key = f"checkpoint {folder}"
            reads[key] = self._noted(stage, key) or fingerprint(folder)
        return reads

    def _noted(self, stage: Stage, key: str) -> str:
        """What was noted of a checkpoint that is gone and that the stage can do without, else "".

        One that is done can, and a training that has a checkpoint of its own, which holds the weights that it
        began with.  What else it cannot do without (a teacher), it asks for itself.
        """
        if os.path.lexists(key.removeprefix("checkpoint ")):
            return ""
        record = self.record(stage)
        can_do_without = record.get("done") or (stage.is_training and _is_checkpoint(stage.output))
        return str(record.get("reads", {}).get(key, "")) if can_do_without else ""

    def do(self, stage: Stage, child: _Child) -> int:
        """One stage, unless it was done; the exit status."""
        self.redone = self.redone or stage.name == self.config.from_stage
        state = "again" if self.redone else self.state(stage)
        if state == "done":
            log.info("%s", f"== {stage.name}: done before")
            return 0
        reads = self.reads(stage)
        # a training goes on from what is there, unless that was made from other inputs; prepare looks itself
        goes_on = stage.is_training and state not in ("again", "changed")
        if not goes_on and stage.command != "prepare":
            set_aside(stage.output)
        log.info("%s", f"== {stage.name}" + (f" ({state})" if state != "to do" else ""))
        self.note(stage, {"reads": reads, "done": False})
        stage.output.parent.mkdir(parents=True, exist_ok=True)
        begin = time.time()
        if child.signal is not None:
            return RUN_AGAIN
        if stage.command in PROCESSES:
            status = child.run(stage.program(self.launcher))
        else:
            status = self.run_command([stage.command, *stage.arguments])
        if status == 0:
            seconds = round(time.time() - begin, 1)
            made = fingerprint(stage.output)
            self.note(stage, {"reads": reads, "done": True, "made": made, "seconds": seconds})
        return status

    def note(self, stage: Stage, record: dict[str, Any]) -> None:
        self.records.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"stage": stage.name, "command": stage.command, **record}, indent=1)
        write_bytes_atomically(self.records / f"{stage.name}.json", text.encode())


def fingerprint(path: Path) -> str:
    """Hash of an output: a data set, a checkpoint or run (its newest weights), another folder, or a file.

    Raises:
        UserError: It is not there.
    """
    if path.is_file():
        return file_sha256(path)
    if (path / MANIFEST_FILE).is_file():
        return Manifest.load(path).fingerprint
    if not path.is_dir():
        raise UserError(f"{path} is not there: the stage that makes it has not been done")
    if (path / "export.json").is_file():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        names = [f"{file.relative_to(path)} {file_sha256(file)}" for file in files]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()
    checkpoint = find_checkpoint(path)
    described = checkpoint.metadata.get("files", {})
    weights = checkpoint.folder / WEIGHTS
    if not weights.is_file() or weights.stat().st_size != described.get(WEIGHTS, {}).get("size"):
        raise UserError(f"{weights} is missing or truncated: do the stage again that makes it (--from)")
    return str(described[WEIGHTS]["sha256"])


def _is_checkpoint(path: Path) -> bool:
    try:
        find_checkpoint(path)
    except UserError:
        return False
    return True


def set_aside(path: Path) -> None:
    """Rename what an earlier stage made, so that nothing is lost and nothing is mixed."""
    if not path.exists():
        return
    number = 1
    while (aside := path.with_name(f"{path.name}.replaced-{number}")).exists():
        number += 1
    os.rename(path, aside)
    log.info("%s", printable(f"   {path} was made from other inputs: kept as {aside.name}"))


class _Child:
    """The process of the stage that runs now."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.signal: int | None = None

    def run(self, program: list[str]) -> int:
        self.process = subprocess.Popen(program)
        status = self.process.wait()
        self.process = None
        return 128 - status if status < 0 else status

    def forward(self, number: int, frame: object) -> None:
        """Pass a signal on to the training that runs; end another stage, which keeps nothing, where it is."""
        again, self.signal = self.signal, number
        if self.process is not None:
            self.process.send_signal(number)
        elif number in (signal.SIGINT, signal.SIGHUP) and not again:
            raise Interrupted(number)


@contextlib.contextmanager
def _forwarding_signals() -> Iterator[_Child]:
    """A signal that asks for a stop goes to the stage, which saves and ends."""
    child = _Child()
    numbers = [signal.SIGTERM, signal.SIGUSR1]
    # a training may also get these from the terminal itself, and takes both for one
    numbers += [n for n in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, child.forward) for number in numbers}
    try:
        yield child
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
