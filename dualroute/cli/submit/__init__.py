"""``dualroute submit``: jobs for Slurm from the configuration of a run."""

from dualroute.cli.submit.command import submit

__all__ = ["submit"]
