"""``dualroute data sample``: documents as the tokenizer reads them back."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from dualroute.data.manifest import Manifest
from dualroute.data.reader import ShardReader
from dualroute.data.tools.config import SampleDataConfig
from dualroute.data.tools.documents import document
from dualroute.errors import UserError, printable


def sample_data(config: SampleDataConfig) -> int:
    """The command.

    Raises:
        UserError: there is no such split or document, or it cannot be read.
    """
    manifest, console = Manifest.load(config.data), Console()
    total = manifest.split(config.split).documents
    if config.number is not None and not config.number < total:
        raise UserError(
            f"number {config.number} is not below the {total:,} documents of split {config.split!r}: "
            "they are counted from 0"
        )
    tokenizer = manifest.tokenizer.opened(manifest.folder)
    reader = ShardReader(manifest, config.split)
    draw = np.random.default_rng(config.seed)
    count = min(config.documents, total)
    numbers = sorted(draw.choice(total, count, replace=False).tolist())
    for number in numbers if config.number is None else [config.number]:
        about = document(manifest, config.split, number)
        ids = reader.read(number, 0, min(about.tokens, config.max_tokens)).tolist()
        language = f", {about.language}" if about.language else ""
        title = f"{config.split} {number:,}: {about.name or 'source not noted'}{language}"
        title += f", {about.tokens:,} tokens, {about.num_bytes:,} bytes"
        console.print(Rule(Text(printable(title)), align="left"))
        if config.ids:
            console.print(Text(" ".join(map(str, ids))), style="dim", soft_wrap=True)
        more = f" … and {about.tokens - len(ids):,} tokens more" if len(ids) < about.tokens else ""
        console.print(Text(printable(tokenizer.decode(ids)) + more), soft_wrap=True)
    return 0
