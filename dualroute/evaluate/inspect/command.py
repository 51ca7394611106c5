"""``dualroute inspect``: a checkpoint and a text in, a page out."""

from __future__ import annotations

import sys
from pathlib import Path

from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.evaluate.inspect.config import InspectConfig
from dualroute.evaluate.inspect.numbers import Inspection, inspect_ids
from dualroute.evaluate.inspect.page import page
from dualroute.evaluate.load import load
from dualroute.files import write_bytes_atomically
from dualroute.model import DualRoutingTransformer
from dualroute.model.steering import steer

#: Of a text on standard input.
MOST_CHARACTERS = 1 << 20


def inspect_text(
    model: DualRoutingTransformer,
    tokenizer: Tokenizer,
    text: str,
    max_tokens: int = 512,
    ablations: tuple[str, ...] = ("routes", "heads", "layers", "blocks"),
) -> Inspection:
    """The numbers of a text, ``<bos>`` in front; see :func:`inspect_ids`.

    Raises:
        UserError: The text is empty, or the model shows nothing.
    """
    ids = tokenizer.encode(text, bos=tokenizer.bos_id >= 0)
    most = min(max_tokens, model.config.max_context)
    notes = []
    if len(ids) > most:
        limit = f"max_tokens {max_tokens}" if most == max_tokens else f"the model's context of {most}"
        notes.append(f"The text has {len(ids):,} tokens; the first {most:,} are shown ({limit}).")
    found = inspect_ids(model, ids[:most], spelled(tokenizer, ids[:most]), ablations)
    found.notes = notes
    return found


def spelled(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """How each token is shown: its text, its bytes where they are no whole character, or its name."""
    texts, pieces = tokenizer.token_bytes(), tokenizer.pieces()
    shown = []
    for number in ids:
        try:
            shown.append(texts[number].decode() or pieces[number])
        except UnicodeDecodeError:
            shown.append("".join(f"<0x{byte:02X}>" for byte in texts[number]))
    return shown


def inspect_command(config: InspectConfig) -> None:
    """``dualroute inspect``: write the page.

    Raises:
        UserError: Any of the inputs cannot be used, or the page cannot be written.
    """
    folder = Path(config.output).parent
    if not folder.is_dir():  # said now, not after the work
        raise UserError(f"--output {config.output}: there is no folder {folder}: make it")
    loaded = load(config.checkpoint, config.device, config.dtype)
    steer(loaded.model, config.scale or "")
    text = sys.stdin.read(MOST_CHARACTERS) if config.text == "-" else config.text
    found = inspect_text(loaded.model, loaded.tokenizer, text, config.max_tokens, tuple(config.ablations))
    if config.scale:
        found.notes.append(f"Scaled: {config.scale}")
    try:
        write_bytes_atomically(config.output, page(found, f"{loaded.checkpoint.folder}").encode())
    except OSError as error:
        raise UserError(f"--output {config.output} cannot be written: {error.strerror or error}") from error
    for note in found.notes:
        print(note)
    parts = f", {len(found.ablations)} parts switched off one by one" if found.ablations else ""
    print(f"{len(found.ids):,} tokens, {len(found.layers)} layers{parts}: {config.output}")
