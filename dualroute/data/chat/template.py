"""A chat as one text: the tokenizer's own jinja template, or ours where it has none.

In: messages, ``{"role": "user", "content": "…"}``.  Here: they are checked, and the template puts its marks
around them, in jinja2's sandbox.  Out: `Rendered`, in which the template's own special tokens can be told
from text of a message that merely spells one.  Next: :mod:`dualroute.data.chat.ids` makes ids of it.

A template comes with a model from elsewhere.  The sandbox keeps it from files and from Python; its size, the
size of what it writes and the lengths it counts to are limited.  Before it sees them, what looks like a
special token in a message gets a character in front that no text has (a noncharacter of Unicode); it is taken
out again when ids are made.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from dualroute.errors import UserError

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
MAX_MESSAGES, MAX_CHARACTERS, MAX_RANGE = 1000, 1 << 24, 100_000
_MARKS = [chr(number) for number in range(0xFDD0, 0xFDF0)]  # noncharacters


@dataclass(frozen=True)
class Rendered:
    """A chat as text.

    Attributes:
        text: What the template wrote, with ``mark`` before what only spells a special token.
        mark: That character.
        generated: Where the template itself says that an answer stands (``{% generation %}``), [start, end).
    """

    text: str
    mark: str
    generated: list[tuple[int, int]]


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse what is no chat.

    A chat is a list of messages with role system (the first one only), user, assistant or tool.  It begins
    with the user, and nobody but a tool speaks twice in a row.

    Raises:
        UserError: Naming the message, what is wrong with it and what is expected.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"messages is {_short(messages)}: give a list of at least one message")
    if len(messages) > MAX_MESSAGES:
        raise UserError(
            f"messages has {len(messages):,} entries: at most {MAX_MESSAGES:,} are read; divide it"
        )
    before = ""
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise UserError(f"{place} is {_short(message)}: give a table with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise UserError(f"{place}.role is {_short(role)}: give one of {', '.join(ROLES)}")
        _check_content(place, role, message)
        _check_turn(place, role, before, number)
        before = role


def _check_content(place: str, role: str, message: Message) -> None:
    content = message.get("content")
    calls_only = role == "assistant" and content is None and message.get("tool_calls")
    if not isinstance(content, str) and not calls_only:
        raise UserError(f"{place}.content is {_short(content)}: give text")


def _check_turn(place: str, role: str, before: str, number: int) -> None:
    if role == "system":
        if number:
            raise UserError(f"{place} is the system's: only the first message may be; join them there")
    elif before in ("", "system"):
        if role != "user":
            raise UserError(
                f"{place} is the {role}'s: a chat begins with the user, after the system's message"
            )
    elif role == before != "tool":
        raise UserError(f"{place} is the {role}'s, as the one before it: join the two, or leave one out")
    elif role == "user" and before == "tool":
        raise UserError(f"{place} is the user's, and the assistant has not answered the tool: add its answer")


class ChatTemplate:
    """A jinja template, compiled when it is first used.

    Args:
        source: Its text.
        place: Where it comes from, for messages.
        specials: Special tokens of the tokenizer.
        variables: What a template knows by name, such as ``bos_token``.
    """

    def __init__(
        self, source: str, place: str, specials: Iterable[str], variables: Mapping[str, str]
    ) -> None:
        self.source, self.place, self.variables = source, place, dict(variables)
        names = sorted(filter(None, specials), key=len, reverse=True)
        self._special = "|".join(map(re.escape, names)) or r"(?!)"

    def specials_in(self, mark: str) -> re.Pattern[str]:
        """Finds the template's own special tokens in a rendered text."""
        return re.compile(f"(?<!{mark})(?:{self._special})")

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Rendered:
        """The chat as text.

        Args:
            messages: As :func:`check_messages` wants them.
            add_generation_prompt: End with the mark at which an answer begins.
            tools: What the assistant may call, as JSON schemas, for templates that know of tools.

        Raises:
            UserError: The template refuses the messages, is damaged, or writes too much.
        """
        given = json.dumps([list(messages), list(tools or [])], ensure_ascii=False, default=str)
        if len(given) > MAX_CHARACTERS:
            raise UserError(
                f"a chat has {len(given):,} characters: at most {MAX_CHARACTERS:,} are read; cut it"
            )
        free = [mark for mark in _MARKS if mark not in given and mark not in self.source]
        if len(free) < 3:
            raise UserError(
                "a chat holds nearly all noncharacters of Unicode (U+FDD0 to U+FDEF): remove them"
            )
        mark, begin, end = free[:3]
        guard = functools.partial(re.compile(f"(?={self._special})").sub, mark)
        text = self._run(
            (begin, end),
            messages=_each_text(guard, messages),
            tools=_each_text(guard, tools) if tools else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self.variables,
        )
        return Rendered(*_without_marks(text, mark, begin, end))

    def _run(self, marks: tuple[str, str], **values: Any) -> str:
        import jinja2

        try:
            pieces, size = [], 0
            for piece in _compiled(self.source, marks).generate(**values):
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise UserError(
                        f"{self.place}: the chat template writes more than {MAX_CHARACTERS:,} characters: "
                        f"give another template, or a shorter chat"
                    )
                pieces.append(piece)
            return "".join(pieces)
        except UserError:
            raise
        except jinja2.exceptions.TemplateSyntaxError as error:
            raise UserError(
                f"{self.place}: the chat template is damaged ({_line(error)}, line {error.lineno}): copy it "
                f"again"
            ) from error
        except Exception as error:  # a foreign program's: of any kind
            raise UserError(
                f"{self.place}: the chat template does not take these messages ({_line(error)}): change "
                f"them, or give another template"
            ) from error


def default_source(specials: Iterable[str], eos: str, bos: str | None) -> str:
    """The template of a tokenizer that comes without one, in the manner of ChatML.

    A turn is ``MARK role newline content END newline``.  MARK and END are ``<|im_start|>`` and ``<|im_end|>``
    where the tokenizer has both; else END is the end of a text, which no message can spell, and MARK is
    ``<reserved_0>``, an id that `data_prep` keeps free, or "### " where there is none.
    """
    known = set(specials)
    if {"<|im_start|>", "<|im_end|>"} <= known:
        mark, end = "<|im_start|>", "<|im_end|>"
    else:
        mark, end = "<reserved_0>" if "<reserved_0>" in known else "### ", eos
    mark, end = (json.dumps(text, ensure_ascii=False) for text in (mark, end))
    begin = f"{{{{ {json.dumps(bos, ensure_ascii=False)} }}}}" if bos else ""
    return (
        f"{begin}{{% for message in messages %}}"
        f"{{{{ {mark} + message['role'] + '\\n' + (message['content'] or '') + {end} + '\\n' }}}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {mark} + 'assistant\\n' }}}}{{% endif %}}"
    )


def _each_text(change: Any, value: Any) -> Any:
    """``value`` with every text in it changed; the names of its fields stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _each_text(change, part) for name, part in value.items()}
    if isinstance(value, Sequence):
        return [_each_text(change, part) for part in value]
    return value


def _without_marks(text: str, mark: str, begin: str, end: str) -> tuple[str, str, list[tuple[int, int]]]:
    """Take the marks of generated parts out, and say where they stood."""
    parts, spans, size, start = [], [], 0, 0
    for part in re.split(f"([{begin}{end}])", text):
        if part == begin:
            start = size
        elif part == end:
            spans.append((start, size))
        else:
            parts.append(part)
            size += len(part)
    return "".join(parts), mark, spans


@functools.lru_cache(maxsize=16)
def _compiled(source: str, marks: tuple[str, str]) -> Any:
    import jinja2
    from jinja2.sandbox import SandboxedEnvironment

    if tuple(map(int, jinja2.__version__.split(".")[:3])) < (3, 1, 6):
        raise UserError(f"jinja2 {jinja2.__version__} has a sandbox with holes: pip install 'jinja2>=3.1.6'")
    environment = _environment(*marks)
    assert isinstance(environment, SandboxedEnvironment)
    return environment.from_string(source)


def _environment(begin: str, end: str) -> Any:
    """Jinja2's sandbox with what transformers gives a template, and with limits."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(x) if isinstance(x, str | list | tuple) else abs(x) for x in (left, right)]
            if max(sizes) > MAX_CHARACTERS or sizes[0] * sizes[1] > MAX_CHARACTERS or operator == "**":
                raise jinja2.exceptions.SecurityError(f"it multiplies {sizes[0]} by {sizes[1]}")
            return super().call_binop(context, operator, left, right)

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_marked")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{begin}{caller()}{end}"

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def limited_range(*bounds: int) -> list[int]:
        numbers = list(itertools.islice(range(*bounds), MAX_RANGE + 1))
        if len(numbers) > MAX_RANGE:
            raise jinja2.exceptions.SecurityError(f"it counts further than {MAX_RANGE:,}")
        return numbers

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.now().strftime(form),
        range=limited_range,
    )
    return environment


def _short(value: Any) -> str:
    return "missing" if value is None else repr(value)[:60]


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
