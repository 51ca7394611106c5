"""``dualroute data inspect`` and ``data show``: what a data set holds, by its manifest alone."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dualroute.data.manifest import Manifest
from dualroute.data.tools.config import ShowDataConfig
from dualroute.errors import printable

_MOST_OPTIONS = 200


def cell(value: Any) -> Text:
    """A value as a cell of a table: nothing in it commands the terminal, or rich."""
    counts = isinstance(value, int) and not isinstance(value, bool)
    return Text(printable(f"{value:,}" if counts else str(value)))


def table(title: str, *columns: str, numbers: int = 0) -> Table:
    """A table whose last ``numbers`` columns are numbers."""
    made = Table(title=Text(printable(title)), title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        right = place >= len(columns) - numbers
        made.add_column(column, justify="right" if right else "left", overflow="fold")
    return made


def inspect_data(config: ShowDataConfig) -> int:
    """``dualroute data inspect``: splits, tokenizer, options, and of a set elsewhere what is here of it.

    Raises:
        UserError: there is no manifest, or it is damaged.
    """
    manifest, console = Manifest.load(config.data), Console()
    splits = table(
        f"{manifest.place}",
        *(
            "split",
            "documents",
            "tokens",
            "bytes of text",
            "bytes a token",
            "tokens a document",
            "shards",
            "on disk",
        ),
        numbers=7,
    )
    for name, split in manifest.splits.items():
        size = sum(shard.size for shard in split.shards)
        per_token, per_document = split.bytes / split.tokens, split.tokens / split.documents
        row = (name, split.documents, split.tokens, split.bytes, f"{per_token:.2f}", f"{per_document:,.1f}")
        splits.add_row(*map(cell, (*row, len(split.shards), f"{size / 2**20:,.1f} MiB")))
    console.print(splits)
    rest = table("", "key", "value")
    tokenizer = manifest.tokenizer
    rest.add_row("tokenizer", cell(f"{tokenizer.vocab_size:,} ids, sha256 {tokenizer.sha256}"))
    rest.add_row("stored as", cell(manifest.dtype))
    rest.add_row("fingerprint", cell(manifest.fingerprint))
    if manifest.mirror is not None:
        shards = [shard for split in manifest.splits.values() for shard in split.shards]
        here = [shard for shard in shards if manifest.mirror.holds(shard.file, shard.size)]
        here_mib = sum(shard.size for shard in here) / 2**20
        copies = f"{len(here)} of {len(shards)} shards, {here_mib:,.1f} MiB, in {manifest.folder}"
        rest.add_row("copies here", cell(copies))
    for key in ("licence", "input_files", "dropped"):
        if manifest.preparation.get(key):
            rest.add_row(key, cell(_listed(manifest.preparation[key])))
    options = manifest.preparation.get("options")
    if isinstance(options, dict):
        for key, value in sorted(options.items())[:_MOST_OPTIONS]:
            rest.add_row(cell(f"option {key}"), cell(_listed(value)))
    console.print(rest)
    return 0


def _listed(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_listed(inner)}" for key, inner in sorted(value.items())) or "none"
    if isinstance(value, str) and not value.isprintable():
        return repr(value)  # a separator of line ends
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text if len(text) <= 500 else f"{text[:499]}…"


def show_data(config: ShowDataConfig) -> int:
    """``dualroute data show``: the same as plain lines.

    Raises:
        UserError: there is no manifest, or it is damaged.
    """
    manifest = Manifest.load(config.data)
    print(summary(manifest))
    tokenizer, options = manifest.tokenizer, manifest.preparation.get("options")
    print(f"tokenizer: {tokenizer.vocab_size:,} ids, stored as {manifest.dtype}, sha256 {tokenizer.sha256}")
    if isinstance(options, dict):
        print("options: " + ", ".join(f"{key} {value!r}" for key, value in sorted(options.items())))
    print(f"fingerprint: {manifest.fingerprint}")
    return 0


def summary(manifest: Manifest) -> str:
    """What a data set holds and what was left out, for people."""
    lines = []
    for name, split in manifest.splits.items():
        lines.append(
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes "
            f"({split.bytes / split.tokens:.2f} bytes a token), {len(split.shards)} shards"
        )
    dropped = manifest.preparation.get("dropped")  # for people: the fingerprint does not cover it
    if isinstance(dropped, dict) and all(isinstance(count, int) for count in dropped.values()) and dropped:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()))
        lines.append(f"dropped: {counts}")
    return "\n".join(lines)
