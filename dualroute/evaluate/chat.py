"""``dualroute chat``: a conversation with a model in the terminal.

In: lines of a terminal, or of a pipe.  Out: answers, each piece as soon as it is there.  Ctrl-C ends an
answer, Ctrl-D the chat; a line that begins with ``/`` is a command (:data:`COMMANDS`).
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable

from dualroute.errors import UserError, printable
from dualroute.evaluate.config import ChatConfig
from dualroute.evaluate.conversation import Conversation
from dualroute.evaluate.load import Loaded, load
from dualroute.model.steering import steer

log = logging.getLogger(__name__)
COMMANDS = {"/reset": "begin a new chat", "/help": "show these lines", "/quit": "leave (also Ctrl-D)"}
#: Characters of one turn.
MOST_CHARACTERS = 1 << 20
_PROMPT = "> "


def chat_command(config: ChatConfig) -> None:
    """Talk with a checkpoint; see the module's docstring.

    Raises:
        UserError: The checkpoint cannot be used, or makes no text.
    """
    loaded = load(config.checkpoint, config.device, config.dtype)
    refuse_silent(loaded)
    steer(loaded.model, config.scale or "")
    conversation = Conversation(
        loaded.model,
        loaded.tokenizer,
        config.sampling,
        config.system,
        cache_dtype=config.cache_dtype,
    )
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        print(
            f"{loaded.checkpoint.folder}; {'; '.join(f'{name}: {what}' for name, what in COMMANDS.items())}"
        )
    talk(conversation, lines_of(terminal), printable if sys.stdout.isatty() else str)


def refuse_silent(loaded: Loaded) -> None:
    """Refuse a model that writes no text.

    Raises:
        UserError: Saying what it is for.
    """
    config = loaded.model.config
    if config.task_head is not None:
        raise UserError(
            f"{loaded.checkpoint.folder} was trained for a task that writes no text: use dualroute predict"
        )
    if not config.causal:
        raise UserError(
            f"{loaded.checkpoint.folder} reads both sides of a token (model.causal false) and cannot write "
            f"text: give a causal model"
        )


def lines_of(terminal: bool) -> Callable[[], str | None]:
    """Gives what the user says next, null at the end."""
    line = _editor() if terminal else input

    def ask() -> str | None:
        while True:
            try:
                return line(_PROMPT)
            except KeyboardInterrupt:
                print()
            except EOFError:
                print()
                return None

    def read() -> str | None:
        try:
            line = sys.stdin.readline(MOST_CHARACTERS + 2)
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 text ({error.reason}): convert it first") from error
        if not line:
            return None
        if any(
            "\ud800" <= character <= "\udfff" for character in line
        ):  # so a locale's own reading marks them
            raise UserError("standard input is not UTF-8 text: convert it first")
        return line.rstrip("\r\n")

    return ask if terminal else read


def _editor() -> Callable[[str], str]:
    """Reads a line of a terminal: with prompt_toolkit, which knows the commands and takes several lines
    (Alt-Enter begins the next one); without it, as Python does."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    except ImportError:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() then edits and remembers lines
        return input
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    words = WordCompleter(list(COMMANDS), sentence=True)
    # what was said stays in this process: a file of it would be somebody's to read
    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory(), completer=words, complete_while_typing=False, key_bindings=keys
    )
    return session.prompt


def talk(conversation: Conversation, ask: Callable[[], str | None], shown: Callable[[str], str]) -> None:
    """Ask and answer until there is nothing more.

    Args:
        conversation: With the model.
        ask: Gives the next turn.
        shown: What of a text may reach standard output.

    Raises:
        UserError: A turn is too long to be read at all.
    """
    while (said := ask()) is not None:
        said = said.strip()
        if len(said) > MOST_CHARACTERS:
            raise UserError(f"a turn has more than {MOST_CHARACTERS:,} characters: shorten it")
        if not said:
            continue
        if said in COMMANDS:
            if said == "/quit":
                return
            if said == "/reset":
                conversation.reset()
            for name, what in COMMANDS.items() if said == "/help" else ():
                print(f"{name}: {what}")
            continue
        answer(conversation, said, shown)


def answer(conversation: Conversation, said: str, shown: Callable[[str], str]) -> None:
    """Print the answer to one turn; Ctrl-C ends it."""
    gone = conversation.left_out
    pieces = conversation.answer(said)
    try:
        for piece in pieces:
            print(shown(piece), end="", flush=True)
    except KeyboardInterrupt:
        pass
    except UserError as error:
        log.warning("%s", error)
        return
    finally:
        pieces.close()
    print(flush=True)
    if conversation.left_out > gone:
        count = conversation.left_out - gone
        log.warning(
            "%s",
            f"the context of {conversation.model.config.max_context} tokens was full: the oldest "
            f"{'question' if count == 1 else f'{count} questions'} and what answered "
            f"{'it' if count == 1 else 'them'} are forgotten",
        )
