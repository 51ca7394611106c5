"""A table of a file as an instance of a flat dataclass.

In: a :class:`~dualroute.configuration.yaml_file.Node` of kind table.  Here: each key is looked up among the
class's fields, each value converted to its field's type.  Out: the instance, which checks its own ranges.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, get_type_hints

from dualroute.configuration.convert import convert
from dualroute.configuration.names import nearest
from dualroute.configuration.yaml_file import Node
from dualroute.errors import UserError

T = TypeVar("T")


def from_table(cls: type[T], table: Node, leave: tuple[str, ...] = ()) -> T:
    """The instance of ``cls`` that a table describes.

    Args:
        cls: A dataclass of values (no dataclasses within).
        table: Of a file.
        leave: Keys that somebody else reads.

    Raises:
        UserError: An unknown key, a missing one, or a value of another type; names the file and line.
    """
    hints = get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for written, node in table.content.items():
        name = written.replace("-", "_")
        if name in leave:
            continue
        if name not in fields:
            near = nearest(name, fields)
            raise UserError(
                f"unknown key '{written}' in {table.key_places.get(written, node.place)}"
                + (f"; did you mean '{near}'?" if near else f"; there are {', '.join(fields)}")
            )
        try:
            values[name] = convert(hints[name], node)
        except UserError as error:
            raise UserError(f"{name} in {node.place}: {error}") from error
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{table.place}: {' and '.join(missing)} must be given")
    try:
        return cls(**values)
    except UserError as error:
        place = next((table.content[n].place for n in values if str(error).startswith(f"{n} ")), table.place)
        raise UserError(f"{place}: {error}") from error
