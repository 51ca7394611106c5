"""The files of a corpus folder, in the order of their paths, each once.

Comes in: a folder. Goes out: names and paths for `corpora`, and a tally of all that is not read.

A link to a file or folder inside the corpus is followed only if what it leads to is not read anyway; one that
leads out of the corpus is counted and passed over, unless ``follow_links`` is set. A folder is entered once,
however many ways lead there, so links that go round in circles end.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.clean import matches
from data_prep.readers.documents import ReadOptions
from data_prep.readers.formats import unknown_kind
from data_prep.tally import Tally, readable

#: A folder with such a file was made by `prepare`, whose shards are no corpus.
PREPARED = "preparation.json"

_Identity = tuple[int, int]  # device and inode


@dataclass
class Scan:
    """What `scan` found: (name, path) of the files to read, and what is passed over."""

    files: list[tuple[str, Path]] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)


def scan(folder: Path, options: ReadOptions) -> Scan:
    """Walk ``folder``; the name of a file is its path below it, with slashes."""
    walk = _Walk(folder, options)
    walk.enter("", folder)
    while walk.links:
        walk.follow(*walk.links.popleft())
    found = sorted(walk.found)
    return Scan([(readable(name), folder / name) for name in found], walk.tally)


class _Walk:
    def __init__(self, root: Path, options: ReadOptions) -> None:
        self.options, self.tally = options, Tally()
        self.found: list[str] = []
        self.links: deque[tuple[str, Path]] = deque()  # followed after all that is no link was seen
        self._inside = os.path.realpath(root)
        self._seen: set[_Identity] = set()  # files to be read and folders entered

    def enter(self, name: str, folder: Path) -> None:
        """Walk a folder called ``name``, and those in it."""
        waiting = [(name, folder)]
        while waiting:
            name, folder = waiting.pop()
            try:
                status = folder.stat()
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                self.tally.skip(f"cannot be opened ({error.strerror})", name or folder)
                continue
            if (status.st_dev, status.st_ino) in self._seen:
                continue
            self._seen.add((status.st_dev, status.st_ino))
            if name and any(entry.name == PREPARED for entry in entries):
                self.tally.skip("folder that prepare made", name)
                continue
            folders = []
            for entry in entries:
                below = f"{name}/{entry.name}" if name else entry.name
                if reason := self._unwanted(entry.name, below):
                    self.tally.skip(reason, below)
                elif entry.is_symlink():
                    self.links.append((below, Path(entry.path)))
                elif entry.is_dir():
                    folders.append((below, Path(entry.path)))
                else:
                    self._file(below, Path(entry.path))
            waiting.extend(reversed(folders))

    def _unwanted(self, last: str, name: str) -> str | None:
        if last.startswith("."):
            return "hidden"
        shown = readable(name)
        if any(matches(shown, pattern) for pattern in self.options.exclude):
            return "excluded"
        return None

    def _file(self, name: str, path: Path) -> None:
        try:
            status = path.stat()
        except OSError as error:
            self.tally.skip(f"cannot be opened ({error.strerror})", name)
            return
        if not stat.S_ISREG(status.st_mode):
            self.tally.skip("pipe, socket or device", name)
        elif reason := unknown_kind(name, self.options):
            self.tally.skip(reason, name)
        else:
            self._seen.add((status.st_dev, status.st_ino))
            self.found.append(name)

    def follow(self, name: str, path: Path) -> None:
        """Read what a link leads to, or say why not."""
        target = os.path.realpath(path)
        try:
            status = os.stat(target)
        except OSError:
            self.tally.skip("link that leads nowhere", name)
            return
        inside = target == self._inside or target.startswith(os.path.join(self._inside, ""))
        if not inside and not self.options.follow_links:
            self.tally.skip("link that leads out of the corpus (follow_links true reads them)", name)
        elif (status.st_dev, status.st_ino) in self._seen:
            self.tally.skip("link to what is read anyway", name)
        elif stat.S_ISDIR(status.st_mode):
            self.enter(name, path)
        else:
            self._file(name, path)
