"""The command line: one parser, one spelling of every option, one rule for paths.

    table.py      the commands, and where their options and functions are
    read.py       words and YAML files → a configuration: schema.py (which keys there are), aliases.py (names
                  that keys once had), and :mod:`dualroute.configuration` (text with its place, text → value)
    entry.py      what the ``dualroute`` command does, and the one line for what a person can mend
    help.py       --help; family.py  ``dualroute checkpoint …``; completion.py  words for the shell
    submit/       ``dualroute submit``: jobs for Slurm

Nothing imports this package but the entry points.  What needs to parse (a pipeline) is handed the function.
"""

from dualroute.cli.entry import main, parse_stage, run_or_explain
from dualroute.cli.table import STAGES

__all__ = ["STAGES", "main", "parse_stage", "run_or_explain"]
