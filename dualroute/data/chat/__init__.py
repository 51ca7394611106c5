"""Chats: messages → the template's text (`template`) → token ids, with the assistant's marked (`ids`).

:meth:`Tokenizer.chat <dualroute.data.tokenizer.Tokenizer.chat>` is the way in.
"""

from dualroute.data.chat.ids import Chat
from dualroute.data.chat.template import Message, check_messages

__all__ = ["Chat", "Message", "check_messages"]
