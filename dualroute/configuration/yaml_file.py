"""A YAML file as it stands: every scalar as its text, every value with its place.

In: the path of a file from outside, or the text of a flag.  Out: :class:`Node`, a tree.  Next:
:mod:`~dualroute.configuration.convert` turns texts into values, once it is known of which type they should
be.

YAML itself would decide from the spelling: ``1e9`` a text, ``32`` never one, ``1:30`` ninety, ``no`` false.
Here the type of the option decides, so a file and a flag are read alike.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dualroute.errors import UserError

#: Limits of a configuration from outside.
MOST_BYTES = 2**18
MOST_NODES = 20_000
MOST_DEPTH = 32
_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "seq", "map")
}


@dataclass(frozen=True)
class Place:
    """Where a value was given: a line of a file, or a flag."""

    name: str
    line: int | None = None
    folder: Path | None = None  # of the file; null for a flag

    def __str__(self) -> str:
        return self.name if self.line is None else f"{self.name}:{self.line}"


@dataclass(frozen=True)
class Node:
    """A value with its place.

    Attributes:
        kind: What ``content`` is: "text", "list" (of nodes) or "table" ({key: node}).
        quoted: Of a text: it stood in quotes, so null is a word.
    """

    kind: str
    content: Any
    place: Place
    quoted: bool = False
    key_places: dict[str, Place] = field(default_factory=dict)

    @property
    def is_null(self) -> bool:
        return self.kind == "text" and not self.quoted and self.content in ("", "~", "null", "Null", "NULL")

    def shown(self) -> str:
        """For a message."""
        if self.kind == "text":
            return "null" if self.is_null else repr(self.content)
        return "a list" if self.kind == "list" else "a table of keys"


def read_file(path: Path) -> Node:
    """The table that a configuration file holds.

    Raises:
        UserError: It cannot be read, is too large or too deep, is not YAML, or holds something else.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            what = "a folder" if path.is_dir() else "no regular file"
            raise UserError(f"{path} is {what}: give a YAML file")
        with path.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the configuration {path} cannot be read: {reason}") from error
    if len(data) > MOST_BYTES:
        raise UserError(f"{path} is larger than {MOST_BYTES // 1024} KiB: that is no configuration")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    node = read_text(text, str(path), path.parent)
    if node.is_null:
        return Node("table", {}, node.place)
    if node.kind != "table":
        raise UserError(f"{path} holds no table of keys and values")
    return node


def read_text(text: str, name: str, folder: Path | None = None) -> Node:
    """The value that YAML text holds; ``name`` is the file or the flag it came from.

    Raises:
        UserError: It is not YAML, or beyond the limits.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return Node("text", "", Place(name, 1 if folder else None, folder))
        return _Reader(name, folder).node(root, ())
    except RecursionError as error:
        raise UserError(f"{name} is nested deeper than {MOST_DEPTH} levels") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = name if mark is None or folder is None else f"{name}:{mark.line + 1}"
        problem = " ".join(str(error.problem or error.context).split())
        hint = ": indent with spaces, not with tabs" if "'\\t'" in problem else ""
        raise UserError(f"{where} is not valid YAML ({problem}){hint}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not valid YAML ({' '.join(str(error).split())})") from error


class _Reader:
    def __init__(self, name: str, folder: Path | None) -> None:
        self.name, self.folder, self.nodes = name, folder, 0

    def place(self, node: yaml.Node) -> Place:
        return Place(self.name, node.start_mark.line + 1 if self.folder else None, self.folder)

    def node(self, node: yaml.Node, above: tuple[int, ...]) -> Node:
        place = self.place(node)
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise UserError(f"{self.name} holds more than {MOST_NODES:,} values, its aliases written out")
        if len(above) > MOST_DEPTH:
            raise UserError(f"{place}: nested deeper than {MOST_DEPTH} levels")
        if id(node) in above:
            raise UserError(f"{place}: an alias that contains itself")
        above = (*above, id(node))
        if node.tag not in _TAGS:
            raise UserError(f"{place}: the tag {node.tag} is not understood: leave it out")
        if isinstance(node, yaml.ScalarNode):
            return Node("text", node.value, place, quoted=node.style is not None)
        if isinstance(node, yaml.SequenceNode):
            return Node("list", [self.node(item, above) for item in node.value], place)
        content: dict[str, Node] = {}
        places: dict[str, Place] = {}
        merged: dict[str, Node] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{self.place(key_node)}: a key must be a word")
            value = self.node(value_node, above)
            if key_node.tag.endswith(":merge"):
                for table in value.content if value.kind == "list" else [value]:
                    if table.kind != "table":
                        raise UserError(f"{value.place}: << takes a table of keys")
                    merged = {**table.content, **merged}
                continue
            key = key_node.value
            if key in content:
                raise UserError(
                    f"{self.name}: the key {key!r} stands twice, in line {places[key].line} and in line "
                    f"{self.place(key_node).line}: keep one"
                )
            content[key], places[key] = value, self.place(key_node)
        return Node("table", {**merged, **content}, place, key_places=places)


def plain(node: Node) -> Any:
    """A node as the Python objects that YAML 1.2 makes of it, for options of no particular type."""
    if node.kind == "list":
        return [plain(item) for item in node.content]
    if node.kind == "table":
        return {key: plain(value) for key, value in node.content.items()}
    if node.quoted:
        return node.content
    if node.is_null:
        return None
    if node.content.lower() in ("true", "false"):
        return node.content.lower() == "true"
    for kind in (int, float):
        try:
            return kind(node.content)
        except ValueError:
            continue
    return node.content
