"""Commands of a family, such as ``dualroute checkpoint export RUN --output FOLDER``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from dualroute.cli.table import FAMILIES, load
from dualroute.errors import UserError


class Parser(argparse.ArgumentParser):
    """Complete names only, dashes and underscores alike; a mistake is a UserError."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (`{self.prog} --help` lists the options)")

    def parse_known_args(self, args=None, namespace=None):
        """argparse's own, on words whose option names have underscores."""
        return super().parse_known_args([underscored(word) for word in args or []], namespace)


def underscored(word: str) -> str:
    """``--gpus-per-node=2`` → ``--gpus_per_node=2``."""
    if not word.startswith("--") or word == "--":
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def family_parser(name: str) -> Parser:
    """The commands of a family, declared."""
    family = FAMILIES[name]
    parser = Parser(prog=f"dualroute {name}", description=family.summary)
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for word, command in family.commands.items():
        of = choices.add_parser(word, help=command.summary, description=command.summary)
        of.add_argument(command.argument[0], help=command.argument[1])
        for option, text in command.required.items():
            of.add_argument(f"--{option}", required=True, help=text)
        for option, values in command.choices.items():
            of.add_argument(f"--{option}", choices=values, default=values[0], help=f"default: {values[0]}")
    return parser


def run_family(name: str, arguments: Sequence[str]) -> int:
    """Parse and run; returns the exit status.

    Raises:
        UserError: A command or option that does not exist, or whatever the command finds.
    """
    try:
        chosen = vars(family_parser(name).parse_args(list(arguments)))
    except SystemExit as done:  # after --help
        return int(done.code or 0)
    status: int = load(FAMILIES[name].commands[chosen.pop("command")].function)(**chosen)
    return status
