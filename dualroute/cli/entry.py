"""The door: ``dualroute STAGE --config FILE --key.sub value``.

Every option is a field of the stage's dataclass, so the YAML keys, the flags and the attribute names in the
code are the same words.  ``--print_config`` shows the result of merging and stops.
"""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dualroute import __version__, log, threads
from dualroute.cli.aliases import present_command
from dualroute.cli.read import Given, Words, merged, split_words
from dualroute.cli.schema import Schema, schema_of
from dualroute.cli.table import FAMILIES, OTHERS, STAGES, load
from dualroute.configuration.names import nearest
from dualroute.errors import Interrupted, UserError, exhaustion, one_line
from dualroute.paths import path_field
from dualroute.training.resilience import stop_signal

#: Exit status of a program that nobody reads any more: 128 + SIGPIPE, as a shell sees it.
NOBODY_READS = 141


class Shown(Exception):
    """What was asked for with --help or --print_config has been printed."""


def _given(stage: str, arguments: Sequence[str]) -> tuple[Schema, Words, Given]:
    schema = schema_of(STAGES[stage].config_class())
    rest, named = list(arguments), []
    for argument in STAGES[stage].arguments:
        if rest and not rest[0].startswith("-"):
            named += [f"--{argument}", rest.pop(0)]
    arguments = [*named, *rest]
    words = split_words(arguments, schema)
    if words.help:
        from dualroute.cli.help import stage_parser

        stage_parser(stage).print_help()
        raise Shown
    given = Given(schema)
    given.add_files(words.files)
    given.add_flags(words.flags)
    return schema, words, given


def parse_stage(stage: str, arguments: Sequence[str]) -> Any:
    """Configuration object of ``stage`` from command-line arguments.

    Raises:
        UserError: An unknown key, a value of the wrong type, or values that contradict each other.
        Shown: ``--help`` or ``--print_config`` was among them.
    """
    schema, words, given = _given(stage, arguments)
    if words.print_config:
        print(_as_yaml(schema, given.converted(), given.nulls), end="")
        raise Shown
    return given.build()


def _as_yaml(schema: Schema, values: dict[str, Any], nulls: set[str]) -> str:
    for key, value in values.items():
        if isinstance(value, str) and path_field(schema.options[key].hint) is not None:
            values[key] = value.replace("$", "$$")
        elif isinstance(value, tuple):
            values[key] = list(value)
    table = merged(schema, values, nulls)

    def listed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: listed(inner) for key, inner in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return str(yaml.safe_dump(listed(table), sort_keys=False, allow_unicode=True))


def run(arguments: Sequence[str]) -> int:
    """Run the stage that ``arguments`` name and return the exit status; see :func:`main`."""
    stage, *rest = arguments
    if stage == "submit":
        from dualroute.cli.submit import submit

        return submit(rest, parse_stage)
    if stage == "configs":
        return _configs(rest)
    if stage == "notebook":
        return _notebook(rest)
    if stage == "completion":
        from dualroute.cli.completion import completion

        return completion(rest)
    if stage in FAMILIES:
        from dualroute.cli.family import run_family

        return run_family(stage, rest)
    if rest and f"{stage} {rest[0]}" in STAGES:  # a name of two words
        stage, rest = f"{stage} {rest[0]}", rest[1:]
    if stage not in STAGES:
        near = nearest(stage, [*STAGES, *FAMILIES, *OTHERS])
        hint = f"; did you mean '{near}'?" if near else f"; choose one of {', '.join(STAGES)}"
        raise UserError(f"unknown stage '{stage}'{hint}")
    stage, rest = present_command(stage, list(rest))
    config = parse_stage(stage, rest)
    function = load(STAGES[stage].function)
    # a pipeline parses and runs other commands, and may not import this module
    more = (parse_stage, run_or_explain) if stage == "pipeline" else ()
    status = function(config, *more)
    return status if isinstance(status, int) else 0


def _asks_help(arguments: Sequence[str]) -> bool:
    return any(word in ("-h", "--help") for word in arguments)


def _configs(arguments: Sequence[str]) -> int:
    """``dualroute configs`` and ``dualroute configs show NAME``."""
    from dualroute.configuration.shipped import describe_configs, shipped_configs

    usage = "write `dualroute configs`, or `dualroute configs show NAME`"
    if not arguments or _asks_help(arguments):
        print(usage if arguments else describe_configs())
        return 0
    if arguments[0] != "show" or len(arguments) != 2:
        raise UserError(usage)
    known = shipped_configs()
    name = arguments[1].removesuffix(".yaml")
    if name not in known:
        near = nearest(name, known)
        raise UserError(f"there is no configuration {name}" + (f"; did you mean {near}?" if near else ""))
    print(known[name].read_text(encoding="utf-8"), end="")
    return 0


def _notebook(arguments: Sequence[str]) -> int:
    """``dualroute notebook [FOLDER]``."""
    from dualroute.configuration.shipped import copy_notebook

    usage = "write `dualroute notebook`, or `dualroute notebook FOLDER`"
    if _asks_help(arguments):
        print(usage)
        return 0
    if len(arguments) > 1 or any(word.startswith("-") for word in arguments):
        raise UserError(usage)
    print(copy_notebook(Path(arguments[0] if arguments else ".")))
    return 0


def usage() -> str:
    """Text of ``dualroute --help``."""
    summaries = {name: stage.summary for name, stage in STAGES.items()}
    summaries |= {name: family.summary for name, family in FAMILIES.items()} | OTHERS
    return "\n".join(
        [
            "usage: dualroute STAGE [--config FILE] [--key value ...]",
            "",
            *(f"  {name:<12} {summary}" for name, summary in summaries.items()),
            "",
            "dualroute STAGE --help lists a stage's options; --print_config shows them after merging.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """What the ``dualroute`` command does; returns the exit status (2: the user can mend it)."""
    if arguments is None:
        threads.prepare()
        arguments = sys.argv[1:]
        if isinstance(sys.stdout, io.TextIOWrapper):  # file names may hold bytes that are no text
            sys.stdout.reconfigure(errors="backslashreplace")
        if arguments[:1] and arguments[0] in stop_signal.TRAININGS:
            stop_signal.install()
        else:
            stop_signal.interrupt()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"dualroute {__version__}")
        return 0
    return run_or_explain(arguments)


def run_or_explain(arguments: Sequence[str]) -> int:
    """:func:`run`, with one line on stderr for what the user can mend."""
    log.to_terminal()
    try:
        status = _run_or_show(arguments)
        sys.stdout.flush()
        return status
    except UserError as error:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"dualroute {one_line(arguments[0])}: error{rank}: {one_line(str(error))}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        if not nobody_reads():
            raise
        return NOBODY_READS
    except (KeyboardInterrupt, Interrupted) as error:
        line, status = stop_signal.interruption(arguments[0], error)
        print(line, file=sys.stderr)
        return status
    except Exception as error:
        used_up = exhaustion(error, arguments[0])
        if used_up is None:
            raise
        print(f"dualroute {one_line(arguments[0])}: error: {one_line(used_up)}", file=sys.stderr)
        return UserError.exit_status


def _run_or_show(arguments: Sequence[str]) -> int:
    try:
        return run(arguments)
    except Shown:
        return 0


def nobody_reads() -> bool:
    """Whether standard output is a pipe that was closed at its other end (``dualroute generate … | head``).

    What is left to print then goes nowhere, so that the interpreter's last flush finds no closed pipe.
    """
    try:
        descriptor = sys.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, 0)
        closed = any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # not a file, as in a test
        return False
    if closed:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
    return closed
