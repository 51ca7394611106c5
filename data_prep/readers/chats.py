"""Chats as documents: a list of messages as one line of JSON, which is what is cleaned, compared and counted.

- In: the value of ``text_key``: messages, or their JSON as text (a column of CSV has no other way).
- Here: every text in it is cleaned as a document would be; what is no chat is left out and counted.
- Next: :func:`chat_ids` gives the ids that training on chats gives them, with the tokenizer's own template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from data_prep.cleaning.text import clean_text
from dualroute.data.chat.messages import NoChat, messages_of
from dualroute.data.chat.template import check_messages
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError


class NoMessages(Exception):
    """The value is nothing that could be messages: the key is another column's; the text says what it is."""


def chat_text(value: object) -> tuple[str, bool]:
    """One line of JSON, and whether turns of one speaker that followed each other were joined.

    Raises:
        NoMessages: It is neither a list nor the JSON of one.
        NoChat: The messages are none of a chat, by `messages_of` or by what templates take
            (`dualroute.data.chat.template.check_messages`).
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise NoMessages("text that is no JSON") from error
    if not isinstance(value, list):
        raise NoMessages(type(value).__name__)
    try:
        messages, joined = messages_of(_each(clean_text, value))
        check_messages(messages)
    except UserError as error:
        raise NoChat(_kind_of(str(error))) from error
    except RecursionError as error:
        raise NoChat("nested too deeply") from error
    return json.dumps(messages, ensure_ascii=False), joined


def said_in(text: str) -> str:
    """What all messages of a chat say, one after the other: what a rule for texts is to look at."""
    said = (message.get("content") for message in json.loads(text))
    return "\n".join(content for content in said if isinstance(content, str))


def rewritten(change: Callable[[str], str], text: str) -> str:
    """A chat with every text in it changed."""
    return json.dumps(_each(change, json.loads(text)), ensure_ascii=False)


def chat_ids(tokenizer: Tokenizer, text: str, name: str, dtype: DTypeLike) -> NDArray[Any]:
    """Ids of what `chat_text` gave, from <bos> to <eos> as those of every document.

    Raises:
        UserError: The tokenizer's template does not take the chat ``name``.
    """
    try:
        ids = tokenizer.chat(json.loads(text)).ids
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    begin = [] if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id]
    end = [] if ids[-1:] == [tokenizer.eos_id] else [tokenizer.eos_id]
    return np.array([*begin, *ids, *end], dtype=dtype)


def _each(change: Callable[[str], str], value: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):  # columns have every field in every message, null where it is none
        return {name: _each(change, part) for name, part in value.items() if part is not None}
    return [_each(change, part) for part in value] if isinstance(value, list) else value


def _kind_of(error: str) -> str:
    """``messages[3] is the user's, as the one before it: …`` → that, without the number and the remedy."""
    return re.sub(r"\[\d+\]", "", error).partition(":")[0]
