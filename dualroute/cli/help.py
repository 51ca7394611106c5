"""``dualroute STAGE --help``: jsonargparse shows the fields of a configuration class as options.

The text of each option is that of its field in the class's docstring.
"""

from __future__ import annotations

import argparse

from jsonargparse import ArgumentParser

from dualroute.cli.schema import schema_of
from dualroute.cli.table import STAGES


def stage_parser(stage: str) -> ArgumentParser:
    """The options of a stage, declared; values are read by :mod:`~dualroute.cli.read`."""
    parser = ArgumentParser(prog=f"dualroute {stage}", description=STAGES[stage].summary)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with any of the options below, or the name of a shipped one (see "
        "`dualroute configs`); may be repeated.",
    )
    parser.add_argument("--print_config", action="store_true", help="Show the merged configuration and stop.")
    config_class = STAGES[stage].config_class()
    parser.add_class_arguments(config_class, sub_configs=True)
    known = {*schema_of(config_class).keys()}
    for action in parser._actions:  # what follows from other settings is a field, and no option
        name = action.dest.removesuffix(".help")
        if "." in name and name not in known and name.rpartition(".")[0] in known:
            action.help = argparse.SUPPRESS
    return parser
