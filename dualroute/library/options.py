"""From what a caller gives to the configuration object of a command.

In: nothing, a configuration object, the name of a shipped configuration, a file, a table, or a list of these;
and keyword options over them.  Here: the same merging as on the command line
(:mod:`dualroute.cli.read`), so a value means what it means there, and an unknown key names the nearest one.
Out: an object such as :class:`~dualroute.training.config.PretrainConfig`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from dualroute.cli.read import Given
from dualroute.cli.schema import schema_of
from dualroute.cli.table import STAGES
from dualroute.configuration.yaml_file import Node, Place
from dualroute.errors import UserError
from dualroute.settings import given_fields

#: A shipped name or a file, a table of options, a configuration object, or files and tables in order.
ConfigLike: TypeAlias = (
    "str | os.PathLike[str] | Mapping[str, Any] | Sequence[str | os.PathLike[str] | Mapping[str, Any]] | Any"
)


def configuration(stage: str, config: ConfigLike | None, options: Mapping[str, Any]) -> Any:
    """The configuration object of a command.

    Args:
        stage: The command, ``pretrain`` say.
        config: See :data:`ConfigLike`; null is the defaults.
        options: {key: value} over it: ``train={"max_steps": 5}``, or ``**{"train.max_steps": 5}``.

    Raises:
        UserError: As the command would say it; or an object of another command, or options besides an object.
    """
    wanted = STAGES[stage].config_class()
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        if not isinstance(config, wanted):
            raise UserError(f"{stage} takes a {wanted.__name__}, not a {type(config).__name__}")
        if options:
            raise UserError(
                f"a {wanted.__name__} and options ({', '.join(options)}) are given: put them into it "
                f"(dataclasses.replace), or give a file or a table instead"
            )
        return config
    given = Given(schema_of(wanted))
    parts = config if isinstance(config, Sequence) and not isinstance(config, str) else [config]
    for part in [one for one in parts if one is not None]:
        if isinstance(part, str | os.PathLike):
            given.add_files([os.fspath(part)])
        elif isinstance(part, Mapping):
            given.add_table(_node("config", part), "")
        else:
            raise UserError(f"a configuration is a name, a file or a table, not {part!r}")
    for key, value in options.items():
        given.add(key, _node(key, value), Place(key))
    return given.build()


def _node(name: str, value: Any) -> Node:
    """A Python value as what a file would hold; a path starts in the working directory."""
    place = Place(name)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {one.name: getattr(value, one.name) for one in given_fields(type(value))}
    if value is None:
        return Node("text", "null", place)
    if isinstance(value, bool):
        return Node("text", str(value).lower(), place)
    if isinstance(value, str | os.PathLike):
        return Node("text", os.fspath(value), place, quoted=True)
    if isinstance(value, Mapping):
        return Node("table", {str(key): _node(f"{key}", inner) for key, inner in value.items()}, place)
    if isinstance(value, Sequence):
        return Node("list", [_node(name, inner) for inner in value], place)
    return Node("text", str(value), place)
