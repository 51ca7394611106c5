"""What was read of a corpus, and what was passed over: counted by reason, with a few names each.

Comes in: a word from `folder`, `formats` and `archives` for every file and every member of an archive. Goes
out: lines for people at the end of a preparation, and ``files`` in its manifest. However large the corpus, a
tally stays small: so many reasons, so many names for each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_REASONS = 150
MAX_EXAMPLES = 5
MAX_NAME = 200
OTHER = "other reasons"
UNKNOWN = "unknown kind "  # followed by the name's ending
_SHOWN_KINDS = 12
_SHOWN_REASONS = 12
_SHOWN_EXAMPLES = 3
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def readable(name: object) -> str:
    r"""A name that fits into a line, a terminal and a JSON file: what is not text in it becomes ``\xNN``.

    File names are bytes. Python carries those that are not UTF-8 as lone surrogates, which no UTF-8 file can
    hold; a name may also hold a line break or an escape sequence of a terminal.
    """
    return _UNPRINTABLE.sub(_escape, str(name))


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


@dataclass
class Skipped:
    """How many files were passed over for one reason, and the first of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Tally:
    """Files and members of archives.

    Attributes:
        read: how many gave documents, by kind (``.txt``, ``.jsonl``).
        skipped: those passed over, by reason.
    """

    read: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, Skipped] = field(default_factory=dict)

    def skip(self, reason: str, name: object, count: int = 1) -> None:
        """Count a file that is passed over."""
        reason = readable(reason)[:MAX_NAME]
        if reason not in self.skipped and len(self.skipped) >= MAX_REASONS:
            reason = OTHER
        entry = self.skipped.setdefault(reason, Skipped())
        entry.count += count
        if len(entry.examples) < MAX_EXAMPLES:
            entry.examples.append(readable(name)[:MAX_NAME])

    def add(self, other: Tally) -> None:
        """Count what ``other`` counted as well."""
        self.read.update(other.read)
        for reason, entry in other.skipped.items():
            mine = self.skipped.setdefault(reason, Skipped())
            mine.count += entry.count
            mine.examples = (mine.examples + entry.examples)[:MAX_EXAMPLES]

    @classmethod
    def from_json(cls, files: Mapping[str, Any]) -> Tally:
        """What `to_json` gave."""
        skipped = {
            reason: Skipped(entry["count"], list(entry["examples"]))
            for reason, entry in files["skipped"].items()
        }
        return cls(Counter(files["read"]), skipped)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        skipped = {
            reason: {"count": entry.count, "examples": entry.examples}
            for reason, entry in sorted(self.skipped.items(), key=lambda item: (-item[1].count, item[0]))
        }
        return {"read": dict(sorted(self.read.items())), "skipped": skipped}


def reasons_of(files: Mapping[str, Any]) -> list[str]:
    """The most frequent reasons, each with a name, for a message of one line; from `Tally.to_json`."""
    skipped = files.get("skipped", {})
    listed = [
        f"{entry['count']:,} {reason} (like {entry['examples'][0]})"
        for reason, entry in list(skipped.items())[:4]
    ]
    return listed + ([f"{len(skipped) - 4} reasons more"] if len(skipped) > 4 else [])


def describe(files: Mapping[str, Any]) -> list[str]:
    """Lines for people, from what `Tally.to_json` gave."""
    read, skipped = files.get("read", {}), files.get("skipped", {})
    lines = []
    if read:
        lines.append(f"read: {_listed(read)}")
    if not skipped:
        return lines
    total = sum(entry["count"] for entry in skipped.values())
    lines.append(f"not read: {total:,} files, folders or members of archives")
    kinds = {reason: entry for reason, entry in skipped.items() if reason.startswith(UNKNOWN)}
    if kinds:
        counts = {reason.removeprefix(UNKNOWN): entry["count"] for reason, entry in kinds.items()}
        lines.append(
            f"  {sum(counts.values()):,} of unknown kinds: {_listed(counts)} (text_endings makes them text)"
        )
    others = [(reason, entry) for reason, entry in skipped.items() if reason not in kinds]
    for reason, entry in others[:_SHOWN_REASONS]:
        names = entry["examples"][:_SHOWN_EXAMPLES]
        dots = ", …" if entry["count"] > len(names) else ""
        lines.append(f"  {entry['count']:,} {reason}: {', '.join(names)}{dots}")
    if len(others) > _SHOWN_REASONS:
        lines.append(f"  and {len(others) - _SHOWN_REASONS} reasons more, in manifest.json")
    return lines


def _listed(counts: Mapping[str, int]) -> str:
    """The most frequent kinds, each with its number."""
    kinds = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = sum(count for _, count in kinds[_SHOWN_KINDS:])
    listed = [f"{count:,} {kind}" for kind, count in kinds[:_SHOWN_KINDS]]
    return ", ".join(listed + ([f"{more:,} of other kinds"] if more else []))
