"""What stands beside a tokenizer file: its chat template, and which of its tokens end a text.

In: the folder of a ``tokenizer.model`` or ``tokenizer.json``.  A Hugging Face folder says these things in
``tokenizer_config.json``, ``chat_template.jinja`` and ``generation_config.json``; a checkpoint of ours in the
first of them alone, in the same words.  Here: `TokenizerSettings`.  Next: :class:`Tokenizer` holds them, and
whatever writes a checkpoint or an export writes them again, so that they travel with the weights.

A tokenizer file alone says neither: Qwen's ends a document with ``<|endoftext|>`` and an answer with
``<|im_end|>``, and only the files beside it tell that a model stops at both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualroute.errors import UserError
from dualroute.files import read_json, read_limited

SETTINGS, TEMPLATE, GENERATION = "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
MAX_TEMPLATE_BYTES = 1 << 20
_MAX_SETTINGS_BYTES = 64 << 20  # every added token stands in some of them
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class TokenizerSettings:
    """What no tokenizer file says.

    Attributes:
        chat_template: A jinja template in the form that transformers reads; null is none.
        named: The special tokens that templates know by name (``bos_token``, ``eos_token``, ``pad_token``,
            ``unk_token``), those that are given.
        stop_ids: Ids besides the tokenizer's own end of text at which a generated text ends.
    """

    chat_template: str | None = None
    named: dict[str, str] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.chat_template or self.named or self.stop_ids)

    def to_bytes(self) -> bytes:
        """The content of a ``tokenizer_config.json``."""
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False).encode()

    def to_json(self) -> dict[str, Any]:
        """As `settings_in` reads it."""
        values: dict[str, Any] = dict(self.named)
        if self.chat_template is not None:
            values["chat_template"] = self.chat_template
        if self.stop_ids:
            values["eos_token_id"] = list(self.stop_ids)
        return values


def read_settings(tokenizer: str | Path) -> TokenizerSettings:
    """What the files beside a tokenizer file say; nothing where there are none.

    Raises:
        UserError: One of them cannot be used; the message names it.
    """
    folder = Path(tokenizer).parent
    found = settings_in(_table(folder / SETTINGS), folder / SETTINGS)
    template = _decoded(folder / TEMPLATE) if (folder / TEMPLATE).is_file() else found.chat_template
    stops = [*found.stop_ids, *_ids(folder / GENERATION, _table(folder / GENERATION))]
    return TokenizerSettings(template, found.named, tuple(dict.fromkeys(stops)))


def settings_in(values: Mapping[str, Any], place: Path) -> TokenizerSettings:
    """What a table in the manner of ``tokenizer_config.json`` says; ``place`` is where it stands.

    Raises:
        UserError: It cannot be used; the message names the key.
    """
    named = {name: text for name in _NAMED if (text := _piece(values.get(name)))}
    template = _template(place, values.get("chat_template"))
    return TokenizerSettings(template, named, tuple(_ids(place, values)))


def _table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values = read_json(path, limit=_MAX_SETTINGS_BYTES)
    if not isinstance(values, dict):
        raise UserError(f"{path} is no table of keys and values: copy it again")
    return values


def _piece(value: Any) -> str | None:
    """A token as it is written: its text, or a table with its text."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _template(path: Path, value: Any) -> str | None:
    """The one template, or the one that is called default of several."""
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict)]
        value = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{path}: chat_template is {str(value)[:50]!r}: a jinja template is needed there")
    return _short(path, value)


def _decoded(path: Path) -> str:
    try:
        return read_limited(path, MAX_TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}): copy it again") from error


def _short(path: Path, template: str) -> str:
    if len(template) > MAX_TEMPLATE_BYTES:
        raise UserError(
            f"{path}: chat_template has {len(template):,} characters, more than {MAX_TEMPLATE_BYTES:,} are "
            f"not read: shorten it"
        )
    return template


def _ids(path: Path, values: Mapping[str, Any]) -> list[int]:
    said = values.get("eos_token_id")
    said = [] if said is None else said if isinstance(said, list) else [said]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in said):
        raise UserError(f"{path}: eos_token_id is {str(said)[:80]}: token ids are needed there")
    return list(said)
