"""Roles in docstrings, ``:class:`x```, become code in the reference; read by mkdocstrings alone."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")


class Roles(griffe.Extension):
    """``:class:`~a.b.C``` → ``C``; two backticks → one."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Called for each object that was read."""
        if obj.docstring:
            text = _ROLE.sub(lambda match: f"`{match[1].rpartition('.')[2]}`", obj.docstring.value)
            obj.docstring.value = re.sub(r"``([^`]+)``", r"`\1`", text)
