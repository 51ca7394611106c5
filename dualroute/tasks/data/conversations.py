"""Chats as rows hold them, in the forms that data sets come in, as one form: a list of messages.

In: a row with ``messages`` (role, content), ``conversations`` (from, value: ShareGPT), ``prompt`` and
``completion``, or ``instruction``, ``input`` and ``output`` (Alpaca).  Out: messages as
:meth:`Tokenizer.chat <dualroute.data.tokenizer.Tokenizer.chat>` takes them.  Next:
:mod:`~dualroute.tasks.kinds.chat` and :mod:`~dualroute.tasks.kinds.preference` encode them.
"""

from __future__ import annotations

from typing import Any

from dualroute.data.chat import messages
from dualroute.data.chat.messages import Message, NoChat
from dualroute.tasks.kind import BadRow


def messages_of(value: Any) -> tuple[list[Message], bool]:
    """A chat, and whether turns of one speaker that followed each other were joined; see
    :func:`dualroute.data.chat.messages.messages_of`.

    Raises:
        BadRow: It is no chat, somebody unknown speaks, or a message is empty.
    """
    try:
        return messages.messages_of(value)
    except NoChat as error:
        raise BadRow(str(error)) from error


def text_of(value: Any, name: str) -> str:
    """A text of a row.

    Raises:
        BadRow: It is none, or empty.
    """
    if not isinstance(value, str):
        raise BadRow(f"no {name}" if value is None else f"{name} is no text")
    if not value.strip():
        raise BadRow(f"empty {name}")
    return value
