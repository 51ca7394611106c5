"""Data sets of the Hugging Face hub, streamed by `datasets`: nothing is downloaded before it is read.

Comes in: ``hf:OWNER/NAME``, with a configuration behind ``:`` and a split behind ``@`` if the set has
several (``hf:wikimedia/wikipedia:20231101.zh@train``); a local folder may stand for the name. Goes out:
documents, named by row.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.readers.documents import Document, ReadOptions, document_of, too_long
from data_prep.tally import readable
from dualroute.errors import UserError

PREFIX = "hf:"
_SPELLED = re.compile(r"hf:(?P<path>[^:@]+)(?::(?P<config>[^:@]+))?(?:@(?P<split>[\w.\-]+))?")


@dataclass(frozen=True)
class HubSet:
    """Which data set, configuration and split."""

    path: str
    config: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, spelled: str) -> HubSet:
        """From ``hf:OWNER/NAME:CONFIG@SPLIT``.

        Raises:
            UserError: spelled otherwise.
        """
        found = _SPELLED.fullmatch(spelled)
        if found is None:
            raise UserError(
                f"corpus {readable(spelled)}: write hf:OWNER/NAME, hf:OWNER/NAME:CONFIG@SPLIT, or parts of it"
            )
        return cls(found["path"], found["config"], found["split"] or "train")

    @property
    def name(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"{os.path.basename(self.path.rstrip('/'))}{config}@{self.split}"

    def revision(self) -> str:
        """The commit that is read, to notice another one later."""
        if os.path.isdir(self.path):
            # of a local folder the newest file tells
            times = [entry.stat().st_mtime_ns for entry in os.scandir(self.path) if entry.is_file()]
            return f"{len(times)} files of {max(times, default=0)}"
        try:
            from huggingface_hub import HfApi

            return str(HfApi().dataset_info(self.path, timeout=30).sha)
        except Exception as error:
            raise _unreachable(self, error) from error


def read_hub(of: HubSet, options: ReadOptions) -> Iterator[Document]:
    """The texts of ``text_key``, row after row.

    Raises:
        UserError: there is no such set, configuration, split or column, or it cannot be reached.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"corpus {PREFIX}{of.path}: needs datasets: pip install -e '.[prepare]'") from error
    rows: Any
    try:
        rows = iter(load_dataset(of.path, of.config, split=of.split, streaming=True))
    except Exception as error:
        raise _unreachable(of, error) from error
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise _unreachable(of, error) from error
        if row is None:
            break
        number += 1
        where = f"{of.name}:{number}"
        if options.text_key not in row:
            raise UserError(
                f"{where}: no column {options.text_key!r} (there are: {', '.join(list(row)[:10])}); set "
                f"text_key"
            )
        value = row[options.text_key]
        if isinstance(value, str) and len(value) > options.max_document_bytes:
            raise too_long(where, "a document", options)
        yield from document_of(value, where, options)
    if number:
        options.files.read["hub rows"] += number


def _unreachable(of: HubSet, error: Exception) -> UserError:
    why = " ".join(readable(error).split())[:300] or type(error).__name__
    return UserError(
        f"corpus {PREFIX}{of.path}: cannot be read ({type(error).__name__}: {why}); check its name, "
        f"configuration and "
        f"split, the network, and HF_TOKEN if it is gated"
    )
