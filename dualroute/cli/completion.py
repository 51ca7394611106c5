"""Completion in the shell: ``dualroute completion bash|zsh|fish`` prints what the shell reads.

In: at each press of Tab, the line so far, in the environment (the protocol of argcomplete).  Here: the
options of the one command on that line are declared to argparse.  Out: argcomplete prints how the word may
go on.

Only the configuration class of that command is imported, which needs no torch.
"""

from __future__ import annotations

import argparse
import os
import types
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from dualroute.cli.family import family_parser
from dualroute.cli.schema import schema_of
from dualroute.cli.table import FAMILIES, OTHERS, STAGES
from dualroute.configuration.shipped import shipped_configs
from dualroute.errors import UserError

SHELLS = ("bash", "zsh", "fish")


def completion(arguments: Sequence[str]) -> int:
    """``dualroute completion SHELL``.

    Raises:
        UserError: Another shell.
    """
    usage = f"write `dualroute completion {'|'.join(SHELLS)}`, and have the shell read what it prints"
    if any(word in ("-h", "--help") for word in arguments):
        print(usage)
        return 0
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise UserError(usage)
    from argcomplete.shell_integration import shellcode

    print(shellcode(["dualroute"], shell=arguments[0]))
    return 0


def complete() -> None:
    """Answer a shell's question and end the process."""
    import argcomplete

    line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", "0") or 0)]
    argcomplete.autocomplete(parser_for(line.split()), always_complete_options=True)


def parser_for(words: Sequence[str]) -> argparse.ArgumentParser:
    """All commands by name, and the options of the one that ``words`` (the program's name first) name."""
    parser = argparse.ArgumentParser(prog="dualroute")
    commands = parser.add_subparsers()
    named = words[1] if len(words) > 1 else ""
    summaries = {name: stage.summary for name, stage in STAGES.items()} | OTHERS
    summaries |= {name: family.summary for name, family in FAMILIES.items()}
    for first in dict.fromkeys(name.partition(" ")[0] for name in summaries):
        known: dict[str, Any] = {"help": summaries[first]} if first in summaries else {}
        if first in FAMILIES and first == named:
            commands.add_parser(first, parents=[family_parser(first)], add_help=False, **known)
            continue
        of = commands.add_parser(first, **known)
        if first != named:
            continue
        second = {name.partition(" ")[2]: name for name in STAGES if name.startswith(f"{first} ")}
        if first in STAGES:
            _add_options(of, first)
        if first == "submit":
            _add_submit(of)
        if first == "completion":
            of.add_argument("shell", choices=SHELLS)
        if first == "configs":
            second = {"show": ""}
        if second and (first not in STAGES or any(word in second for word in words[2:3])):
            inner = of.add_subparsers()
            for word, name in second.items():
                leaf = inner.add_parser(word, help=STAGES[name].summary if name else "print one")
                if name:
                    _add_options(leaf, name)
                else:
                    leaf.add_argument("name", choices=list(shipped_configs()))
    return parser


def _add_options(parser: argparse.ArgumentParser, stage: str) -> None:
    schema = schema_of(STAGES[stage].config_class())
    config: Any = parser.add_argument("--config", help="YAML file, or the name of a shipped configuration")
    config.completer = _configs
    parser.add_argument("--print_config", action="store_true")
    for key, option in schema.options.items():
        choices = [str(word) for word in _words(option.hint)]
        if option.is_switch:
            parser.add_argument(f"--{key}", nargs="?", choices=["true", "false"])
        else:
            parser.add_argument(f"--{key}", choices=choices or None)


def _add_submit(parser: argparse.ArgumentParser) -> None:
    from dualroute.cli.submit.command import build_parser

    for action in build_parser()._actions:
        if action.dest != "help":
            parser._add_action(action)


def _words(hint: Any) -> Iterable[Any]:
    """The words that a value may be."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, types.UnionType, Annotated):
        return [word for inner in get_args(hint) for word in _words(inner)]
    return []


def _configs(prefix: str, **_: Any) -> list[str]:
    from argcomplete.completers import FilesCompleter

    return [*shipped_configs(), *FilesCompleter(("yaml", "yml"))(prefix)]
