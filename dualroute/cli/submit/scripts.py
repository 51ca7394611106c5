"""Scripts for ``sbatch``: templates of ``slurm/`` filled in, and handed to Slurm.

Whatever is filled in comes from outside.  A value in a line ``#SBATCH`` is one line of printable text, or it
is refused; a word of a command is quoted for bash, with its control characters as escapes, so that no value
can begin a line of its own.

The templates are plain bash to be read and edited.  Nothing is hidden here but the replacement of ``@NAME@``.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dualroute.configuration.shipped import shipped_folder
from dualroute.errors import UserError, one_line, printable

_NAME = re.compile(r"[A-Za-z0-9_.,:@+][A-Za-z0-9_.,:@+-]*")


def quoted(word: str) -> str:
    """A word of a bash command, on one line: ``$'…'`` with escapes where there are control characters."""
    if not any(is_control(character) for character in word):
        return shlex.quote(word)
    escaped = ""
    for character in word:
        if is_control(character):
            escaped += "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
        else:
            escaped += f"\\{character}" if character in "\\'" else character
    return f"$'{escaped}'"


def joined(words: Iterable[str]) -> str:
    """Words of a bash command."""
    return " ".join(quoted(word) for word in words)


def is_control(character: str) -> bool:
    """Whether it ends a line, is read by a terminal, or is a byte that is no text."""
    number = ord(character)
    return number < 32 or 127 <= number < 160 or number in (0x2028, 0x2029) or 0xD800 <= number < 0xE000


def in_a_comment(what: str, value: str) -> str:
    """A value for a line ``#SBATCH``.

    Raises:
        UserError: It would end the line.
    """
    if any(is_control(character) for character in value):
        raise UserError(f"{what} {value!r} holds a control character, which would end its line of the script")
    return value


def check_names(options: argparse.Namespace) -> None:
    """Partition, account, quality of service and options for sbatch, as they were given.

    Raises:
        UserError: One is no name, or no option.
    """
    for name in ("partition", "account", "qos"):
        value = getattr(options, name)
        if value is not None and _NAME.fullmatch(value) is None:
            raise UserError(f"--{name} {value!r} is no name: letters, digits and . , : @ + - _ make one")
    for option in options.sbatch:
        in_a_comment("--sbatch", option)
        if not option.startswith("-") or option.strip() != option:
            raise UserError(f"--sbatch {option!r} is no option of sbatch: write --sbatch=--constraint=a100")


def _path_in_a_comment(what: str, path: Path, pattern: str = "") -> str:
    """A path for Slurm, which replaces % and a letter in it; ``pattern`` is meant to be replaced."""
    text = in_a_comment(what, str(path))
    return shlex.quote(f"{text.replace('%', '%%')}/{pattern}" if pattern else text)


def template_folder() -> Path:
    """The folder ``slurm``, of the checkout or of the installed package."""
    return shipped_folder("slurm")


def render(name: str, values: Mapping[str, str], own: Path | None = None) -> str:
    """The template ``name`` (or the file ``own``) with every ``@NAME@`` replaced.

    Raises:
        UserError: The file cannot be read, or has a name that there is no value for.
    """
    path = own or template_folder() / name
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"the template {path} is no regular file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"the template {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the template {path} is not UTF-8 text (byte {error.start})") from error

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise UserError(f"{path} has @{match[1]}@, which is none of {', '.join(sorted(values))}")
        return values[match[1]]

    return re.sub(r"@([A-Z_]+)@", value, text)


def common_values(
    options: argparse.Namespace, name: str, folder: Path, log: str, *, training: bool = True
) -> dict[str, str]:
    """What all templates have; a stage that is no training is one process, on one GPU if there are any."""
    gpus = options.gpus_per_node if training else min(options.gpus_per_node, 1)
    given = {
        "gpus-per-node": gpus or None,
        "cpus-per-task": options.cpus_per_task,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
    }
    lines = [f"--{key}={value}" for key, value in given.items() if value] + options.sbatch
    values = {
        "JOB_NAME": re.sub(r"[^A-Za-z0-9_.-]", "_", name),
        "LOG": _path_in_a_comment("output", folder, log),
        "WORKDIR": _path_in_a_comment("the working directory", Path.cwd()),
        "TIME": options.time,
        "OPTIONS": "\n".join(f"#SBATCH {line}" for line in lines),
        "PYTHON": quoted(sys.executable),
    }
    if training:
        values |= {
            "NODES": str(options.nodes),
            "TASKS_PER_NODE": str(options.tasks_per_node),
            "STALL_REQUEUES": str(options.stall_requeues),
        }
    return values


def hand_to_slurm(scripts: Sequence[Path]) -> None:
    """One script by itself or several as a chain; prints the job of each.

    Raises:
        UserError: There is no Slurm here, or it refused.
    """
    command = ["bash", str(template_folder() / "pipeline.sh"), *map(str, scripts)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"bash cannot be started: {error}") from error
    if done.returncode:
        if "sbatch: command not found" in done.stderr:
            raise UserError("there is no sbatch here: submit from a login node, or look with --dry-run")
        raise UserError(f"Slurm refused: {one_line(done.stderr)}")
    for line in map(printable, done.stdout.splitlines()):
        print(f"job {line.partition(' ')[0]}: {line.partition(' ')[2]}")
    print(f"logs: {printable(str(scripts[0].parent))}; squeue shows the queue")
