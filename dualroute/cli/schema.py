"""The options of a command, read off its configuration class.

In: a dataclass, whose fields may be dataclasses (a group of options, ``train.max_steps``) or sections of a
pipeline (the options of another command, none of them required).  Out: every dotted key with its type and
default.  Next: :mod:`~dualroute.cli.read` looks keys up here.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from dualroute.pipeline.section import SectionOf
from dualroute.settings import given_fields


@dataclass(frozen=True)
class Option:
    """One value."""

    hint: Any
    default: Any  # dataclasses.MISSING where it must be given

    @property
    def is_switch(self) -> bool:
        """Whether a flag of it may stand alone."""
        return self.hint is bool


@dataclass(frozen=True)
class Group:
    """Several options under one name.

    Attributes:
        make: The dataclass that is built of them; null for a section, which stays a table of what was given.
        default: Of a section: the table that it begins with.
        optional: Null leaves all of it out.
    """

    make: type | None
    default: dict[str, Any] | None = field(default_factory=dict)
    optional: bool = False


@dataclass
class Schema:
    """All keys of a command.

    Attributes:
        options: {dotted key: option}.
        groups: {dotted key: group}; the whole configuration is the group "".
    """

    options: dict[str, Option] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)

    def keys(self) -> Iterator[str]:
        yield from self.options
        yield from (name for name in self.groups if name)


@cache
def schema_of(config_class: type) -> Schema:
    """The schema of a configuration class."""
    schema = Schema(groups={"": Group(config_class)})
    _add(schema, config_class, "", section=False)
    return schema


def _add(schema: Schema, config_class: type, prefix: str, *, section: bool, begins: Any = None) -> None:
    """Add the options of a class; ``begins`` is what the class that has it as a field begins with."""
    hints = get_type_hints(config_class, include_extras=True)
    for one in given_fields(config_class):
        key, hint = f"{prefix}{one.name}", hints[one.name]
        of = _section(hint)
        if of is not None:
            default: Any = own_default(one)
            optional = type(None) in get_args(get_args(hint)[0])
            schema.groups[key] = Group(None, default, optional)
            schema.options[f"{key}.config"] = Option(of.files, None)
            _add(schema, of.config, f"{key}.", section=True)
        elif dataclasses.is_dataclass(hint):
            schema.groups[key] = Group(None if section else hint)  # type: ignore[arg-type]
            inner = one.default_factory() if callable(one.default_factory) else None
            _add(schema, hint, f"{key}.", section=section, begins=inner)  # type: ignore[arg-type]
        else:
            default = own_default(one) if begins is None else getattr(begins, one.name)
            schema.options[key] = Option(hint, default)


def own_default(one: dataclasses.Field[Any]) -> Any:
    """What a field is where nothing is said of it; dataclasses.MISSING where something must be."""
    return one.default_factory() if callable(one.default_factory) else one.default


def _section(hint: Any) -> SectionOf | None:
    if get_origin(hint) is Annotated:
        return next((word for word in get_args(hint)[1:] if isinstance(word, SectionOf)), None)
    return None


def takes_text(hint: Any) -> bool:
    """Whether the text of a flag is the value itself, not YAML of a list or table."""
    if get_origin(hint) is Annotated:
        return takes_text(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return all(takes_text(one) for one in get_args(hint))
    return hint is not Any and get_origin(hint) not in (list, tuple, dict)


def takes_list(hint: Any) -> bool:
    """Whether a value is a list, so that several words after a flag are its items."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(takes_list(one) for one in get_args(hint))
    return get_origin(hint) is list
