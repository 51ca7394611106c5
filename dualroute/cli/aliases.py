"""Keys that were renamed, and the other spellings of a key: one place for all commands.

What is given under an old name counts under the new one, and one line says so.
"""

from __future__ import annotations

import os
import sys

from dualroute.errors import one_line

#: Old dotted key → the present one, in every command (and section of a pipeline) that has the present one.
RENAMED = {
    "train.checkpoint_every_layers": "train.recompute_every_layers",
    # a folder of shards is --data in every command; trainings read more than a folder, see GROUP_FIELD
    "data.path": "data",
}
#: Group → the field that a text in its place means: ``--data data/books`` is ``--data.path data/books``.
GROUP_FIELD = {"data": "path"}
#: Names of flags that are no fields, because they are words of Python.
FLAG_NAMES = {"from": "from_stage"}


def present_command(stage: str, words: list[str]) -> tuple[str, list[str]]:
    """The command that is meant, and its words: ``generate --interactive`` is ``chat``."""
    flags = [word for word in words if word.partition("=")[0] == "--interactive"]
    if stage != "generate" or not flags:
        return stage, words
    say("generate --interactive is dualroute chat")
    rest = list(words)
    at = rest.index(flags[0])
    del rest[at : at + 2 if "=" not in flags[0] and rest[at + 1 : at + 2] in (["true"], ["True"]) else at + 1]
    return "chat", rest


def present_name(key: str, known: set[str]) -> str | None:
    """What a key that does not exist is called now; null where it never was one."""
    for old, new in RENAMED.items():
        if key == old or key.endswith(f".{old}"):
            renamed = key.removesuffix(old) + new
            if renamed in known:
                return renamed
    return None


def say(line: str) -> None:
    """A note for the person who started a command; of several ranks the first one says it."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"dualroute: note: {one_line(line)}", file=sys.stderr)
