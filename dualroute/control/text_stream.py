"""From tokens to the text that is shown: whole characters, and nothing from a stop on."""

from __future__ import annotations

from collections.abc import Sequence

from dualroute.data.tokenizer import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # the end of a character is still to come
_TAIL = (
    8  # tokens of what stands before that are decoded with the first new one: some change how it is spelled
)


class TextStream:
    """The text of one sampler's tokens, piece by piece.

    A piece is held back while its last character is incomplete, or while it may begin a stop.

    Args:
        tokenizer: The model's.
        before: Ids in front of the text, where it continues them.
        stops: Texts at which it ends.

    Attributes:
        text: What was written so far, without a stop and what follows it.
        stopped: The stop that was met, null before.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids = list(before[-_TAIL:])
        self._start, self._read = (
            0,
            len(self._ids),
        )  # of the tokens that are decoded together, and of new ones
        self._shown = 0  # characters of `text`
        self.text = ""
        self.stopped: str | None = None

    def add(self, token: int) -> str:
        """What may be shown once the token was written; nothing after a stop."""
        if self.stopped is not None:
            return ""
        self._ids.append(token)
        spelled = self._new_text()
        if spelled.endswith(_INCOMPLETE):
            return ""
        return self._take(spelled)

    def finish(self) -> str:
        """What is left to be shown at the end."""
        unread = self.stopped is None and self._read < len(self._ids)
        piece = self._take(self._new_text()) if unread else ""
        rest, self._shown = self.text[self._shown :], len(self.text)
        return piece + rest

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        return self._tokenizer.decode(self._ids[self._start :])[len(before) :]

    def _take(self, spelled: str) -> str:
        self._start, self._read = self._read, len(self._ids)
        searched = max(0, len(self.text) - max((len(stop) for stop in self._stops), default=0) + 1)
        self.text += spelled
        places = [(self.text.find(stop, searched), stop) for stop in self._stops]
        found = [(place, stop) for place, stop in places if place >= 0]
        if found:
            place, self.stopped = min(found, key=lambda one: (one[0], -len(one[1])))
            self.text = self.text[:place]
        ready = len(self.text) if found else len(self.text) - self._may_be_stop()
        piece, self._shown = self.text[self._shown : ready], max(self._shown, ready)
        return piece

    def _may_be_stop(self) -> int:
        """Characters at the end of the text that begin a stop."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for count in range(min(longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-count:]) for stop in self._stops):
                return count
        return 0
