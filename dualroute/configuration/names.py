"""The valid name nearest to one that is none: what a message asks "did you mean …?" about."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(key: str, keys: Iterable[str]) -> str | None:
    """The valid key most like ``key``: by the whole dotted name, else by its last word."""
    keys = list(keys)
    close = difflib.get_close_matches(key, keys, 1, cutoff=0.7)
    if not close:
        last = {name.rsplit(".", 1)[-1]: name for name in keys}
        word = key.rsplit(".", 1)[-1]
        close = [last[one] for one in difflib.get_close_matches(word, last, 1, cutoff=0.6)]
    return close[0] if close else None


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Line about a name that does not exist: the nearest one, or all of them."""
    known = list(known)
    near = nearest(name, known)
    hint = f"did you mean {near}" if near else f"choose {', '.join(known)}"
    return f"there is no {what} {name!r}: {hint}"
