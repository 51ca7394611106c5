"""From the text of a value to a value of an option's type.

In: a :class:`~dualroute.configuration.yaml_file.Node` and the type of the field.  Out: a Python value.  A
file and a flag are converted alike: ``1e9``, ``10_000``, ``10k`` and ``2M`` are integers where an integer is
wanted, ``32`` is the word "32" where a word is.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from decimal import Decimal
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dualroute.configuration.yaml_file import Node, plain
from dualroute.errors import UserError
from dualroute.paths import PathField, resolve

_SUFFIXES = {"": 0, "k": 3, "K": 3, "M": 6, "G": 9, "T": 12}
_WHOLE = re.compile(r"([+-]?[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][+-]?[0-9]+)?) ?([kKMGT]?)", re.ASCII)
_LARGEST = 2**63 - 1
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def convert(hint: Any, node: Node) -> Any:
    """The value of type ``hint`` that ``node`` stands for.

    Raises:
        UserError: It stands for none; the message says what was expected, without the key.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        paths = [word for word in arguments[1:] if isinstance(word, PathField)]
        if not paths:
            return convert(arguments[0], node)
        if node.kind != "text" or (node.is_null and node.place.folder is not None):
            raise _expected("a path", node)
        return resolve(node.content, paths[0], node.place.folder)
    if origin in (Union, types.UnionType):
        return _union(arguments, node)
    if origin is Literal:
        return _word(arguments, node)
    if origin is list:
        if node.kind == "text" and not node.is_null and hasattr(arguments[0], "from_text"):
            node = Node("list", [node], node.place)  # one entry
        if node.kind != "list":
            raise _expected("a list such as [a, b]", node)
        return [convert(arguments[0], item) for item in node.content]
    if origin is tuple:
        if node.kind != "list" or len(node.content) != len(arguments):
            raise _expected(f"a list of {len(arguments)}", node)
        return tuple(convert(of, item) for of, item in zip(arguments, node.content, strict=True))
    if origin is dict:
        if node.kind != "table":
            raise _expected("a table of keys and values", node)
        return {key: convert(arguments[1], value) for key, value in node.content.items()}
    if hint is Any:
        return plain(node)
    if dataclasses.is_dataclass(hint):
        return _table(hint, node)
    return _scalar(hint, node)


def _table(of: Any, node: Node) -> Any:
    """An entry of a list that is a dataclass: a table of its fields, or a text that it knows to read."""
    if node.kind == "text" and not node.is_null and hasattr(of, "from_text"):
        values: Any = of.from_text(node.content)
        node = _node_of(values, node)
    if node.kind != "table":
        raise _expected("a table of keys and values", node)
    hints = get_type_hints(of, include_extras=True)
    known = {field.name: field for field in dataclasses.fields(of)}
    found = {}
    for key, value in node.content.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise UserError(f"unknown key {key!r}{hint}")
        try:
            found[key] = convert(hints[key], value)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
    missing = [
        name
        for name, field in known.items()
        if name not in found
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{', '.join(missing)} must be given in {node.shown()}")
    return of(**found)


def _node_of(value: Any, like: Node) -> Node:
    """A value as it would have been read where ``like`` stands."""
    if isinstance(value, dict):
        return Node("table", {key: _node_of(one, like) for key, one in value.items()}, like.place)
    return Node("text", value, like.place)


def describe(hint: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return "a path" if any(isinstance(word, PathField) for word in arguments) else describe(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(one) for one in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is list:
        return "a list"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(hint, "a table of keys and values")


def _expected(what: str, node: Node) -> UserError:
    return UserError(f"expected {what}, got {node.shown()}")


def _union(members: tuple[Any, ...], node: Node) -> Any:
    if node.is_null and type(None) in members:
        return None
    others = [member for member in members if member is not type(None)]
    lists = [member for member in others if get_origin(member) is list]
    if lists and (node.kind == "list" or len(others) == 1):
        return convert(lists[0], node)
    rest = [member for member in others if member not in lists]
    try:
        return convert(rest[0], node)
    except UserError as error:
        expected = f"expected {describe(rest[0])},"
        if str(error).startswith(expected) and type(None) in members:
            raise UserError(str(error).replace(expected, f"{expected[:-1]} or null,", 1)) from error
        raise


def _word(words: tuple[Any, ...], node: Node) -> Any:
    if node.kind == "text" and not node.is_null:
        for word in words:
            if node.content == str(word):
                return word
        near = difflib.get_close_matches(node.content, map(str, words), 1, cutoff=0.7)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"expected one of {', '.join(map(str, words))}, got {node.shown()}{hint}")
    raise _expected(f"one of {', '.join(map(str, words))}", node)


def _scalar(hint: Any, node: Node) -> Any:
    if node.kind != "text" or (node.is_null and (hint is not str or node.place.folder is not None)):
        raise _expected(describe(hint), node)
    text = node.content
    if hint is str:
        if any("\ud800" <= character <= "\udfff" for character in text):  # bytes of a flag
            raise _expected("UTF-8 text", node)
        return text
    if hint is bool:
        if text.lower() not in _BOOLS:
            raise _expected("true or false", node)
        return _BOOLS[text.lower()]
    return _integer(text, node) if hint is int else _number(text, node)


def _integer(text: str, node: Node) -> int:
    match = _WHOLE.fullmatch(text.strip())
    if match is None:
        wrong = re.fullmatch(r"[0-9.]+ ?(m|b|B|g|t)", text.strip(), re.ASCII)
        hint = " (k, M, G and T are thousand, million, 10^9 and 10^12)" if wrong else ""
        raise UserError(f"expected an integer, got {node.shown()}{hint}")
    try:
        number = Decimal(match[1].replace("_", "")).scaleb(_SUFFIXES[match[2]])
        if number.adjusted() > 40:
            raise UserError(f"{text} is too large: the largest integer is {_LARGEST}")
    except ArithmeticError as error:
        raise UserError(f"{text} is too large: the largest integer is {_LARGEST}") from error
    if number != number.to_integral_value():
        raise _expected("an integer", node)
    if abs(number) > _LARGEST:
        raise UserError(f"{text} is too large: the largest integer is {_LARGEST}")
    return int(number)


def _number(text: str, node: Node) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float(_integer(text, node)) if _WHOLE.fullmatch(text.strip()) else math.nan
        if math.isnan(number):
            raise _expected("a number", node) from None
    if not math.isfinite(number):
        raise _expected("a finite number", node)
    return number
