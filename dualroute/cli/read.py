"""From the words of a command line to a configuration: files merged, flags on top, every value typed.

1. ``--config`` files are read in the order given, each with the files that it names for its groups.
2. Flags are laid over them.  Later values win, key by key: a flag changes its own key and nothing else of
   the group that the key stands in.
3. What was given is converted to the types of the fields; all else has its default.

jsonargparse declares the options and prints their help (:mod:`~dualroute.cli.help`).  Reading is done here
because a value keeps its place, so that an error names the file and line, or the flag, that it comes from;
because the same text means the same in a file and in a flag; and because what was *given* stays known.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from dualroute.cli import aliases
from dualroute.cli.schema import Schema, own_default, takes_list, takes_text
from dualroute.configuration.convert import convert
from dualroute.configuration.names import nearest
from dualroute.configuration.shipped import find_config
from dualroute.configuration.yaml_file import Node, Place, read_file, read_text
from dualroute.errors import UserError
from dualroute.settings import given_fields, note_given


@dataclass
class Words:
    """A command line, taken apart.

    Attributes:
        files: Of ``--config``, in order.
        flags: (dotted key, value or null for a switch, the flag as it was written).
        print_config: Show the merged configuration and stop.
        help: Show the options and stop.
    """

    files: list[str] = field(default_factory=list)
    flags: list[tuple[str, str | None, str]] = field(default_factory=list)
    print_config: bool = False
    help: bool = False


def split_words(arguments: Sequence[str], schema: Schema) -> Words:
    """``--key value``, ``--key=value``, ``--switch`` and ``--no-switch``; dashes are underscores in a key.

    Several words after the flag of a list, or one number, are its items: ``--lengths 4096 16384`` is
    ``--lengths [4096, 16384]``.

    Raises:
        UserError: A word that is no option, or an option without its value.
    """
    words = Words()
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            words.help = True
            continue
        if not word.startswith("--") or word == "--":
            raise UserError(f"{word!r} is no option: options are written --key value")
        written, has_value, value = word.partition("=")
        key = written[2:].replace("-", "_")
        key = aliases.FLAG_NAMES.get(key, key) if key not in schema.options else key
        if key == "print_config":
            words.print_config = True
            continue
        given: str | None = value if has_value else None
        if not has_value and rest and not rest[0].startswith("--"):
            given = rest.pop(0)
            more = list(takewhile(lambda one: not one.startswith("--"), rest))
            if key in schema.options and takes_list(schema.options[key].hint):
                if more or given.strip().isdigit():
                    given = json.dumps([given, *more])  # a list in YAML too
                del rest[: len(more)]
        if key == "config":
            if given is None:
                raise UserError("--config needs a file")
            words.files.append(given)
        else:
            words.flags.append((key, given, written))
    return words


@dataclass
class Given:
    """What was given, before it is converted: {key: node}, later values in place of earlier ones."""

    schema: Schema
    values: dict[str, Node] = field(default_factory=dict)
    nulls: set[str] = field(default_factory=set)  # groups that are left out

    def add_files(self, files: Iterable[str]) -> None:
        for name in files:
            self.add_table(read_file(find_config(name)), "")

    def add_table(self, table: Node, prefix: str) -> None:
        for written, node in table.content.items():
            key = f"{prefix}{written.replace('-', '_')}"
            self.add(key, node, table.key_places.get(written, node.place))

    def add(self, key: str, node: Node, place: Place) -> None:
        """One key of a file or flag; a group's keys one by one."""
        schema = self.schema
        if key in schema.groups and key:
            self._add_group(key, node)
        elif key in schema.options and not self._is_old_group(key, node):
            self._not_null_above(key)
            self.values[key] = node
        elif key in schema.options:
            self.add_table(node, f"{key}.")
        else:
            known = set(schema.keys())
            name = aliases.present_name(key, known)
            if name is None:
                raise UserError(self._unknown(key, place))
            aliases.say(f"{key} ({place}) is called {name} here")
            self.add(name, node, place)

    def _is_old_group(self, key: str, node: Node) -> bool:
        """Whether a table stands for an option that has been a group elsewhere: ``data: {path: FOLDER}``."""
        names = [f"{key}.{name}" for name in node.content] if node.kind == "table" else []
        return bool(names) and all(aliases.present_name(name, set(self.schema.options)) for name in names)

    def _add_group(self, key: str, node: Node) -> None:
        group = self.schema.groups[key]
        if node.kind == "table":
            self._not_null_above(f"{key}.")
            self.add_table(node, f"{key}.")
        elif node.is_null:
            if group.optional:
                self.values = {k: v for k, v in self.values.items() if not k.startswith(f"{key}.")}
                self.nulls.add(key)
        elif node.kind == "text" and (file := self._file_of_group(node)) is not None:
            self._not_null_above(f"{key}.")
            self.add_table(read_file(file), f"{key}.")
        elif node.kind == "text" and f"{key}.{aliases.GROUP_FIELD.get(key.rsplit('.', 1)[-1])}" in (
            self.schema.options
        ):
            name = key.rsplit(".", 1)[-1]
            self.add(f"{key}.{aliases.GROUP_FIELD[name]}", node, node.place)
        else:
            some = [name for name in self.schema.options if name.startswith(f"{key}.")][:3]
            raise UserError(
                f"{self.named(key, node.place)}: expected its options ({', '.join(some)}, …) or a YAML file "
                f"of them, got {node.shown()}"
            )

    def _file_of_group(self, node: Node) -> Path | None:
        """The file that a text in a group's place names, which starts in the folder of the file it is in."""
        text = str(node.content)
        if text.endswith((".yaml", ".yml")):
            path = Path(text).expanduser()
            return path if node.place.folder is None else node.place.folder / path
        try:
            found = find_config(text) if "/" in text else None
        except UserError:
            return None
        return None if found is None or found.is_dir() else found  # a folder is data, see GROUP_FIELD

    def _not_null_above(self, key: str) -> None:
        self.nulls = {name for name in self.nulls if not key.startswith(f"{name}.")}

    def named(self, key: str, place: Place) -> str:
        """A key and where its value was given."""
        return f"{key} in {place}" if place.folder is not None else place.name

    def _unknown(self, key: str, place: Place) -> str:
        near = nearest(key, self.schema.keys())
        if place.folder is None:
            return f"unknown key '{key}'" + (f"; did you mean '{near}'?" if near else "")
        return f"unknown key '{key}' in {place}" + (f"; did you mean '{near}'?" if near else "")

    def add_flags(self, flags: Iterable[tuple[str, str | None, str]]) -> None:
        """Flags, over what the files say."""
        options, groups = self.schema.options, self.schema.groups
        for key, text, written in flags:
            place = Place(written)
            name, value = key, text
            bare = key.removeprefix("no_")
            if text is None and key not in options and bare in options and options[bare].is_switch:
                name, value = bare, "false"
            elif text is None and key in options and options[key].is_switch:
                value = "true"
            if value is None and (name in options or name in groups):
                raise UserError(f"{written} needs a value")
            if name in options and takes_text(options[name].hint):
                self.add(name, Node("text", value or "", place), place)
            elif name in options or (name in groups and (value or "").lstrip().startswith("{")):
                self.add(name, read_text(value or "", written), place)
            else:
                self.add(name, Node("text", value or "", place), place)

    def converted(self) -> dict[str, Any]:
        """{key: value of its field's type}.

        Raises:
            UserError: A value is not of the type; names the key and the file and line, or the flag.
        """
        found = {}
        for key, node in self.values.items():
            try:
                found[key] = convert(self.schema.options[key].hint, node)
            except UserError as error:
                raise UserError(f"{self.named(key, node.place)}: {error}") from error
        return found

    def build(self) -> Any:
        """The configuration object, which knows what was given of it.

        Raises:
            UserError: A value of the wrong type, a required one that is missing, or a contradiction.
        """
        values = self.converted()
        try:
            config = build(self.schema, values, self.nulls)
        except UserError as error:
            raise UserError(self.with_place(str(error))) from error
        note_given(config, self.values)
        return config

    def with_place(self, message: str) -> str:
        """A message that begins with a key, with the line of the file that the key stands in."""
        node = self.values.get(message.partition(" ")[0])
        return message if node is None or node.place.folder is None else f"{message} ({node.place})"


def build(schema: Schema, values: dict[str, Any], nulls: set[str], name: str = "") -> Any:
    """The configuration object of a group, its groups within it.

    Raises:
        UserError: A required option is missing, or values contradict each other.
    """
    group = schema.groups[name]
    if group.make is None:
        return _section(schema, values, nulls, name)
    arguments: dict[str, Any] = {}
    missing = []
    for one in given_fields(group.make):
        key = f"{name}.{one.name}" if name else one.name
        if key in schema.groups:
            arguments[one.name] = build(schema, values, nulls, key)
        elif key in values:
            arguments[one.name] = values[key]
        elif (default := schema.options[key].default) is dataclasses.MISSING:
            missing.append(key)
        elif default != own_default(one):  # what the class around it begins with
            arguments[one.name] = default
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given: --{missing[0]} …")
    return group.make(**arguments)


def _section(schema: Schema, values: dict[str, Any], nulls: set[str], name: str) -> Any:
    """A table of what was given, on top of what the section begins with."""
    given = {
        key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")
    }
    if name in nulls or (schema.groups[name].default is None and not given):
        return None
    table: dict[str, Any] = dict(schema.groups[name].default or {})
    for key, value in given.items():
        *above, last = key.split(".")
        place = table
        for word in above:
            place = place.setdefault(word, {})
        place[last] = value
    return table


def merged(schema: Schema, values: dict[str, Any], nulls: set[str]) -> dict[str, Any]:
    """Every option with its value as nested tables, for ``--print_config``; a required one is null."""
    table: dict[str, Any] = {}
    sections = [name for name, group in schema.groups.items() if name and group.make is None]

    def put(key: str, value: Any) -> None:
        *above, last = key.split(".")
        place = table
        for word in above:
            place = place.setdefault(word, {})
        place[last] = value

    for key in _in_order(schema):
        section = next((name for name in sections if key == name or key.startswith(f"{name}.")), None)
        if key == section:
            put(key, _section(schema, values, nulls, key))
        elif section is None and key in schema.options:
            default = schema.options[key].default
            put(key, values.get(key, None if default is dataclasses.MISSING else default))
    return table


def _in_order(schema: Schema) -> Iterator[str]:
    """Keys in the order of the class's fields."""
    make = schema.groups[""].make
    assert make is not None
    for one in dataclasses.fields(make):
        yield from (key for key in [*schema.groups, *schema.options] if key.split(".")[0] == one.name and key)
