"""What all configuration classes have in common: each value is checked, and what was given is known.

In: a dataclass whose fields were filled from YAML, flags or Python.  Here: :func:`check_fields` compares
every field with its annotation and its range, so that no class can forget one;  :func:`note_given` lets each
group of fields know which of them were given rather than left at their default.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from dualroute.errors import UserError

#: Where nothing else is said: more is a slip of the keyboard, and overflows somewhere on its way.
MOST_INT = 10**15
MOST_FLOAT = 1e9


class Range(NamedTuple):
    """Numbers from ``least`` to ``most``; without the ends where these are excluded."""

    least: float = 0
    most: float | None = None
    without_least: bool = False
    without_most: bool = False

    def problem(self, value: float, ceiling: float) -> str | None:
        """What ``value`` must be and is not, in words; null if it is in the range."""
        most = ceiling if self.most is None else self.most
        low = value < self.least or (self.without_least and value == self.least)
        high = value > most or (self.without_most and value == most)
        if not low and not high:
            return None
        if self.most is not None and self.most <= 10:
            brackets = "(" if self.without_least else "[", ")" if self.without_most else "]"
            return f"it must be in {brackets[0]}{self.least:g}, {self.most:g}{brackets[1]}"
        if high:
            return f"it must be {'below' if self.without_most else 'at most'} {most:g}"
        if self.without_least:
            return f"it must be above {self.least:g}"
        return f"it must be {'0 or more' if not self.least else f'at least {self.least:g}'}"


#: Metadata of a field that no one gives: it follows from others, and is no option of a command.
DERIVED = {"derived": True}
SEEDS = Range(-(2**63), 2**63 - 1)  # what torch takes


def at_least(least: float, most: float | None = None) -> Range:
    """``least`` or more."""
    return Range(least, most)


def above(least: float, most: float | None = None) -> Range:
    """More than ``least``."""
    return Range(least, most, without_least=True)


@functools.cache
def _annotations(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def check_fields(
    config: Any,
    section: str,
    ranges: Mapping[str, Range] | None = None,
    *,
    may_be_empty: Collection[str] = (),
) -> None:
    """Compare every field of a configuration with its annotation and its range.

    Args:
        config: An instance of a dataclass; fields that are dataclasses check themselves.
        section: What its keys begin with, ``train`` say; empty for keys without a section.
        ranges: Of numbers; the default is 0 or more.  In a list or a dictionary each number has to be in it.
        may_be_empty: Texts that may be empty.

    Raises:
        UserError: Naming the key, its value, and what it must be.
    """
    ranges = ranges or {}
    for name, annotation in _annotations(config.__class__).items():
        value = getattr(config, name)
        problem = _problem(value, annotation, ranges.get(name, Range()), name in may_be_empty)
        if problem is not None:
            raise UserError(f"{section + '.' if section else ''}{name} is {_shown(value)}: {problem}")


def _problem(value: Any, annotation: Any, allowed: Range, may_be_empty: bool) -> str | None:
    """What is wrong with ``value``, in words."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if type(None) in inside and value is None:
            return None
        kinds = [kind for kind in inside if kind is not type(None)]
        problems = [_problem(value, kind, allowed, may_be_empty) for kind in kinds]
        null = ", or null" if type(None) in inside else ""
        return None if None in problems else f"{problems[0]}{null}"
    if origin is Literal:
        # True == 1: only a choice of the same type is one
        if any(value == choice and type(value) is type(choice) for choice in inside):
            return None
        choices = [str(choice) for choice in inside]
        return f"choose {', '.join(choices[:-1])}{' or ' if choices[1:] else ''}{choices[-1]}"
    if origin in (list, tuple, dict):
        return _container_problem(value, origin, inside, allowed)
    if annotation is bool:
        return None if isinstance(value, bool) else "it must be true or false"
    if annotation is int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            return "it must be a whole number"
        return allowed.problem(int(value), MOST_INT)
    if annotation is float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return "it must be a number"
        if not isinstance(value, numbers.Integral) and not math.isfinite(value):
            return "it must be a finite number"
        return allowed.problem(value, MOST_FLOAT)  # type: ignore[arg-type]
    if annotation is str:
        if not isinstance(value, str):
            return "it must be a text"
        if "\0" in value:
            return "it must not hold a zero byte"
        return None if value.strip() or may_be_empty else "it must not be empty"
    if dataclasses.is_dataclass(annotation) and not isinstance(value, annotation):  # type: ignore[arg-type]
        return "it must be a table of keys and values"
    return None


def _container_problem(value: Any, origin: Any, inside: tuple[Any, ...], allowed: Range) -> str | None:
    if origin is dict:
        if not isinstance(value, Mapping):
            return "it must be a table of keys and values"
        parts, kind = list(value.values()), inside[1]
    else:
        if isinstance(value, str) or not isinstance(value, Sequence):
            return "it must be a list"
        parts, kind = list(value), inside[0]
        if origin is tuple and Ellipsis not in inside and len(parts) != len(inside):
            return f"give {len(inside)} values"
    for part in parts:
        problem = _problem(part, kind, allowed, may_be_empty=True)
        if problem is not None:
            return f"of {_shown(part)}, {problem}"
    return None


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def given_fields(cls: Any) -> tuple[dataclasses.Field[Any], ...]:
    """The fields of a configuration class that are options of a command."""
    return tuple(one for one in dataclasses.fields(cls) if not one.metadata.get("derived"))


def note_given(config: Any, keys: Iterable[str]) -> None:
    """Let ``config``, and each dataclass in it, know the fields that were given: its attribute ``given``.

    Args:
        config: An instance of a dataclass.
        keys: Dotted keys, such as ``model.window``.
    """
    names = {field.name for field in dataclasses.fields(config)}
    keys = frozenset(key for key in keys if key.partition(".")[0] in names)
    object.__setattr__(config, "given", keys)  # a frozen one too
    for name in names:
        part = getattr(config, name)
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            prefix = f"{name}."
            note_given(part, {key.removeprefix(prefix) for key in keys if key.startswith(prefix)})
