"""Chats as data sets hold them, in the forms that they come in, as one form: a list of messages.

In: ``messages`` (role, content), or ``conversations`` (from, value: ShareGPT).  Out: messages as
:meth:`Tokenizer.chat <dualroute.data.tokenizer.Tokenizer.chat>` takes them.  Next: the rows of fine-tuning
(`dualroute.tasks.data.conversations`) and documents of a corpus (`data_prep.readers.chats`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]


class NoChat(ValueError):
    """A value that holds no chat; the message is the reason, the same for all of the kind of fault."""


#: Names that data sets give to those who speak.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatbot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
MOST_MESSAGES = 1000


def messages_of(value: Any) -> tuple[list[Message], bool]:
    """A chat, and whether turns of one speaker that followed each other were joined.

    Args:
        value: A list of tables with role and content, or from and value; or the same as JSON.

    Raises:
        NoChat: It is no chat, somebody unknown speaks, or a message is empty.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise NoChat("messages are no list") from error
    if not isinstance(value, list) or not value:
        raise NoChat("no messages")
    if len(value) > MOST_MESSAGES:
        raise NoChat(f"more than {MOST_MESSAGES} messages")
    found: list[Message] = []
    joined = False
    for number, message in enumerate(value):
        one = _message(message)
        if one["role"] == "system" and number:
            raise NoChat("a message of the system that is not the first one")
        if found and one["role"] == found[-1]["role"] and one["role"] in ("user", "assistant"):
            if one.get("tool_calls") or found[-1].get("tool_calls"):
                raise NoChat("two turns of the assistant in a row, one of them with calls of tools")
            found[-1] = {**found[-1], "content": f"{found[-1]['content']}\n\n{one['content']}"}
            joined = True
        else:
            found.append(one)
    return found, joined


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise NoChat("a message is no table of role and content")
    who = message.get("role", message.get("from"))
    role = ROLES.get(who.strip().lower()) if isinstance(who, str) else None
    if role is None:
        raise NoChat(f"a message of an unknown role ({str(who)[:40]!r}; known are {', '.join(ROLES)})")
    content = message.get("content", message.get("value"))
    calls = message.get("tool_calls")
    if role == "assistant" and calls and content is None:
        content = ""
    if not isinstance(content, str):
        raise NoChat("the content of a message is no text")
    if not content.strip() and not calls:
        raise NoChat("an empty answer" if role == "assistant" else "an empty message")
    return {"role": role, "content": content} | ({"tool_calls": calls} if calls else {})
