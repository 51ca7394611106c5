"""A chat as token ids, with the tokens that the assistant wrote marked.

In: messages, and a `Tokenizer` with its chat template.  Here: the template's text is cut at its special
tokens, which become their ids; all else is encoded as text, so that a message which spells ``<|im_end|>``
ends nothing.  Out: `Chat`.  Next: training on answers alone, ``dualroute chat``, and exports.

Ids of a chat begin with the ids of the prompt that led to each of its answers: what a model was trained to go
on from is what it is given when it answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dualroute.data.chat.template import ChatTemplate, Message, Rendered, check_messages, default_source
from dualroute.data.tokenizer_settings import TokenizerSettings
from dualroute.errors import UserError


@dataclass(frozen=True)
class Chat:
    """A chat as ids.

    Attributes:
        ids: Token ids.
        answer: For each of them, whether the assistant wrote it; the token that ends its turn is its own.
    """

    ids: list[int]
    answer: list[bool]


@dataclass(frozen=True)
class SpecialToken:
    """A token that no text makes.

    Attributes:
        id: Its id.
        eats_before, eats_after: White space beside it in a template is part of it.
    """

    id: int
    eats_before: bool = False
    eats_after: bool = False


class ChatTokenizer(Protocol):
    """What a chat asks of a tokenizer; :class:`~dualroute.data.tokenizer.Tokenizer` is one."""

    path: Path
    settings: TokenizerSettings
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int

    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def special_tokens(self) -> dict[str, SpecialToken]: ...
    @property
    def chat_template(self) -> ChatTemplate: ...
    def pieces(self) -> list[str]: ...
    def encode(self, text: str) -> list[int]: ...


def chat_ids(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    answers: bool = True,
) -> Chat:
    """Ids of a chat; see :meth:`Tokenizer.chat <dualroute.data.tokenizer.Tokenizer.chat>`."""
    check_messages(messages)
    template = tokenizer.chat_template
    rendered = template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
    spans = _answers(template, rendered, messages, tools, tokenizer) if answers else []
    ids: list[int] = []
    answer: list[bool] = []
    for part, start in _parts(template, rendered, tokenizer, spans):
        ids += part
        answer += [any(first <= start < last for first, last in spans)] * len(part)
    return Chat(ids, answer)


def named_specials(tokenizer: ChatTokenizer) -> dict[str, str]:
    """{bos_token, eos_token, pad_token, unk_token: as it is written} of those that the tokenizer has."""
    pieces = tokenizer.pieces()
    of_ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "pad_token": tokenizer.pad_id,
        "unk_token": tokenizer.unk_id,
    }
    return {name: pieces[number] for name, number in of_ids.items() if number >= 0}


def template_of(tokenizer: ChatTokenizer) -> ChatTemplate:
    """The template of a tokenizer, or the default one, spelt from its special tokens.

    Raises:
        UserError: It has no template, and nothing that ends a turn.
    """
    specials, settings = tokenizer.special_tokens, tokenizer.settings
    variables = named_specials(tokenizer)
    source = settings.chat_template
    if source is None:
        if tokenizer.eos_id < 0:
            raise UserError(
                f"tokenizer {tokenizer.path} has no chat template and no token that ends a text, which "
                f"could end a turn: give a template"
            )
        source = default_source(specials, variables["eos_token"], variables.get("bos_token"))
    return ChatTemplate(source, f"tokenizer {tokenizer.path}", specials, {**variables, **settings.named})


def _answers(
    template: ChatTemplate,
    rendered: Rendered,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    tokenizer: ChatTokenizer,
) -> list[tuple[int, int]]:
    """Where in the rendered text the assistant's words stand, [start, end), in order.

    Told by the template (``{% generation %}``), or found: an answer begins where the prompt of the messages
    before it ends.

    Raises:
        UserError: A template that changes earlier turns when later ones come.
    """
    if rendered.generated:
        return rendered.generated
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    text, specials = rendered.text, template.specials_in(rendered.mark)
    stops = {number for number in tokenizer.eos_ids if number >= 0}
    spans = []
    for number in turns:
        before = _again(template, rendered, messages[:number], tools, add_generation_prompt=True)
        if not text.startswith(before):
            raise UserError(
                f"{template.place}: its chat template writes messages[{number}] otherwise than it begins an "
                f"answer, so what the assistant wrote cannot be told; mark it in the template with "
                f"{{% generation %}}, or give another template"
            )
        start = len(before)
        upto = _again(template, rendered, messages[: number + 1], tools)
        found = specials.finditer(text, start)
        if len(upto) > start and text.startswith(upto):
            ends = [match.end() for match in found if match.end() <= len(upto)]
            end = ends[-1] if ends else len(upto)
        else:  # what stands before depends on what comes after: the first token that ends a turn
            at = (match.end() for match in found if tokenizer.special_tokens[match[0]].id in stops)
            end = next(at, len(text))
        spans.append((start, end))
    return spans


def _again(
    template: ChatTemplate,
    rendered: Rendered,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool = False,
) -> str:
    """The beginning of the chat, with the same mark before what only spells a special token."""
    part = template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
    return part.text.replace(part.mark, rendered.mark)


def _parts(
    template: ChatTemplate, rendered: Rendered, tokenizer: ChatTokenizer, spans: list[tuple[int, int]]
) -> Iterator[tuple[list[int], int]]:
    """Ids of the text part by part, with the place in the text where each part begins."""
    text, mark = rendered.text, rendered.mark
    edges = sorted({edge for span in spans for edge in span})
    place = 0
    for match in template.specials_in(mark).finditer(text):
        token = tokenizer.special_tokens[match[0]]
        if match.start() >= place:  # white space may have gone with the token before
            run = text[place : match.start()]
            yield from _run(tokenizer, run.rstrip() if token.eats_before else run, place, edges, mark)
        yield [token.id], match.start()
        place = match.end()
        if token.eats_after:
            place += len(text[place:]) - len(text[place:].lstrip())
    yield from _run(tokenizer, text[place:], place, edges, mark)


def _run(
    tokenizer: ChatTokenizer, run: str, offset: int, edges: list[int], mark: str
) -> Iterator[tuple[list[int], int]]:
    """Ids of text between special tokens, cut at ``edges``.

    What stands before an edge has the ids that it has alone, as in a prompt; text is encoded whole where that
    gives the same.
    """

    def encode(part: str) -> list[int]:
        return tokenizer.encode(part.replace(mark, ""))

    cuts = [edge - offset for edge in edges if 0 < edge - offset < len(run)]
    yield from _cut(encode, run, cuts, offset)


def _cut(
    encode: Callable[[str], list[int]], run: str, cuts: list[int], offset: int
) -> Iterator[tuple[list[int], int]]:
    whole = encode(run) if run else []
    lengths = []
    for cut in cuts:
        before = encode(run[:cut])
        if whole[: len(before)] != before:
            break
        lengths.append(len(before))
    places = [0, *cuts]
    if len(lengths) == len(cuts):
        for first, last, place in zip([0, *lengths], [*lengths, len(whole)], places, strict=True):
            yield whole[first:last], offset + place
    else:
        for place, end in zip(places, [*cuts, len(run)], strict=True):
            yield encode(run[place:end]), offset + place
