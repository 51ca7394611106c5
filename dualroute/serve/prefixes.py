"""Texts whose keys and values are kept for requests that begin like them, the least recently used go first.

Only a text as a whole can be gone on with: the local route keeps a window, which cannot be put back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from dualroute.model.decoding.batched import Caches, held_bytes

#: Shorter ones are read as quickly as copied.
SHORTEST = 32


@dataclass(frozen=True)
class Prefix:
    """A text that was read, and its caches, which nobody writes any more."""

    ids: tuple[int, ...]
    caches: Caches
    bytes: int


class PrefixCache:
    """At most `most_bytes` of them."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self._texts: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._texts)

    def find(self, prompt: Sequence[int]) -> Prefix | None:
        """The longest kept text that `prompt` begins with and goes on after."""
        prompt = tuple(prompt)
        found = None
        for ids, text in self._texts.items():
            longer = found is None or len(ids) > len(found.ids)
            if longer and len(ids) < len(prompt) and prompt[: len(ids)] == ids:
                found = text
        if found is not None:
            self._texts.move_to_end(found.ids)
        return found

    def keep(self, ids: Sequence[int], caches: Caches, room: int) -> None:
        """Keep a text, if it fits into `room` bytes and what may be kept at all."""
        size, ids = held_bytes(caches), tuple(ids)
        if len(ids) < SHORTEST or size > min(self.most_bytes, room):
            return
        old = self._texts.pop(ids, None)
        if old is not None:
            self.bytes -= old.bytes
        self.shrink_to(min(self.most_bytes, room) - size)
        self._texts[ids] = Prefix(ids, caches, size)
        self.bytes += size

    def shrink_to(self, most: int) -> None:
        """Let the least recently used go until all take at most `most` bytes."""
        while self.bytes > most and self._texts:
            _, text = self._texts.popitem(last=False)
            self.bytes -= text.bytes
