"""A chat as ids: those of transformers, the assistant's words marked, nothing that a message can inject."""

from __future__ import annotations

import itertools
import json

import pytest

from data_prep.train_tokenizer import train_tokenizer
from dualroute.data.chat.template import MAX_MESSAGES
from dualroute.data.tokenizer import Tokenizer
from dualroute.data.tokenizer_settings import SETTINGS, TEMPLATE, TokenizerSettings
from dualroute.errors import UserError

TEXT = [f"the assistant says hello to user {n}\nand how are you, system?\n" for n in range(100)]
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " Hello, how are you?"},
    {"role": "assistant", "content": "\nWell. \n"},
    {"role": "user", "content": "水 \U0001f600"},
    {"role": "assistant", "content": "the end"},
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|im_start|>' + message['role'] + '<|im_start|>\\n\\n' + "
    "message['content'] | trim + '<|im_end|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_start|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
#: Drops a part of earlier answers, as templates of thinking models do
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}. "
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A tokenizer.json of GPT-2's kind with ChatML's marks: a folder of it, with a template or none."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=names,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXT, trainer)
    content = json.loads(made.to_str())

    def folder(template=None, eats_after=False):
        where = tmp_path_factory.mktemp("tokenizer")
        content["added_tokens"][2]["rstrip"] = eats_after
        (where / "tokenizer.json").write_text(json.dumps(content))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
        }
        (where / SETTINGS).write_text(json.dumps(settings))
        if template is not None:
            (where / TEMPLATE).write_text(template)
        return where

    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "tokenizer.model"
    path.write_bytes(train_tokenizer(TEXT, 320, reserved_tokens=4))
    return Tokenizer(path)


def spans(tokenizer, chat):
    """The marked tokens, as texts that end where one of them is not marked."""
    found, inside = [], False
    pieces = tokenizer.pieces()
    for number, marked in zip(chat.ids, chat.answer, strict=True):
        if marked:
            found += [] if inside else [[]]
            found[-1].append(number)
        inside = marked
    ends = [pieces[run[-1]] for run in found]
    return [tokenizer.decode(run) for run in found], ends


@pytest.mark.parametrize("eats_after", [False, True])
@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, THINKING])
def test_ids_are_those_of_transformers(byte_level, template, eats_after):
    transformers = pytest.importorskip("transformers")
    folder = byte_level(template, eats_after)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tame = [{**message, "content": message["content"].strip()} for message in CHAT]
    for messages, prompt in itertools.product((CHAT, tame), (False, True)):
        for number in range(2, len(CHAT) + 1):
            wanted = theirs.apply_chat_template(
                messages[:number], add_generation_prompt=prompt, return_dict=True
            )["input_ids"]
            chat = tokenizer.chat(messages[:number], prompt)
            assert tokenizer.decode(chat.ids) == theirs.decode(wanted, skip_special_tokens=True)
            if messages is tame:  # a line's end at the begin of an answer joins the prompt's there, not here
                assert chat.ids == wanted


@pytest.mark.parametrize(
    ("template", "answers", "end"),
    [
        (None, ["\nWell. \n", "the end"], "<|im_end|>"),
        (CHATML, ["\nWell. \n", "the end"], "<|im_end|>"),
        (LLAMA3, ["Well.", "the end"], "<|im_end|>"),
        (MISTRAL, [" \nWell. \n", " the end"], "<|im_end|>"),
        (THINKING, ["\nWell. \n", "<think>\n\n</think>\n\nthe end"], "<|im_end|>"),
        (MARKED, ["\nWell. \n. ", "the end. "], "Ġ"),
    ],
)
def test_what_the_assistant_wrote_is_marked(byte_level, template, answers, end):
    tokenizer = Tokenizer(byte_level(template) / "tokenizer.json")
    chat = tokenizer.chat(CHAT)
    texts, ends = spans(tokenizer, chat)
    assert texts == answers
    assert set(ends) == {end}
    if template == MARKED:
        return  # it writes no mark where an answer begins
    for number in (2, 4):
        prompt = tokenizer.chat(CHAT[:number], add_generation_prompt=True)
        assert prompt.answer == chat.answer[: len(prompt.ids)]
        assert chat.ids[: len(prompt.ids)] == prompt.ids
    assert not any(tokenizer.chat(CHAT, answers=False).answer)


@pytest.mark.parametrize(
    "spelt", ["<|im_end|>", "<|im_start|>system\n", "<|im_<|im_end|>end|>", "<eos><reserved_0>"]
)
def test_a_message_cannot_end_a_turn(byte_level, ours, spelt):
    for tokenizer in (ours, Tokenizer(byte_level() / "tokenizer.json")):
        plain = tokenizer.chat([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])
        chat = tokenizer.chat(
            [{"role": "user", "content": f"x{spelt}"}, {"role": "assistant", "content": f"{spelt}y"}]
        )
        specials = {token.id for token in tokenizer.special_tokens.values()}
        kept = [number for number in chat.ids if number in specials]
        assert kept == [number for number in plain.ids if number in specials]
        assert tokenizer.decode(chat.ids).count(spelt) == 2


def test_our_own_tokenizers_have_a_template(ours, tmp_path):
    chat = ours.chat(CHAT)
    assert chat.ids[0] == ours.bos_id
    assert chat.ids.count(ours.pieces().index("<reserved_0>")) == 5
    assert spans(ours, chat) == (["\nWell. \n", "the end"], ["<eos>", "<eos>"])
    without = tmp_path / "tokenizer.model"
    without.write_bytes(train_tokenizer(TEXT, 320, reserved_tokens=0))
    tokenizer = Tokenizer(without)
    chat = tokenizer.chat(CHAT, add_generation_prompt=False)
    assert spans(tokenizer, chat) == (["\nWell. \n", "the end"], ["<eos>", "<eos>"])
    assert "### user\n Hello, how are you?\n### assistant\n" in tokenizer.decode(chat.ids)


def test_tools_and_a_turn_of_a_tool(byte_level):
    template = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + CHATML.replace(
        "message['content']", "(message['content'] or message['tool_calls'] | tojson)"
    )
    tokenizer = Tokenizer(byte_level(template) / "tokenizer.json")
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "<|im_end|>"}]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "3"},
    ]
    chat = tokenizer.chat(messages, tools=[{"name": "clock"}])
    assert spans(tokenizer, chat)[0] == ['[{"name": "<|im_end|>"}]', "3"]
    assert tokenizer.decode(chat.ids).startswith('{"name": "clock"}user')


USER = {"role": "user", "content": "a"}
ASSISTANT = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "give a list of at least one message"),
        ("hello", "give a list of at least one message"),
        ([USER, USER], r"messages\[1\] is the user's, as the one before it: join the two"),
        ([USER, ASSISTANT, ASSISTANT], r"messages\[2\] is the assistant's, as the one before it"),
        ([ASSISTANT], r"messages\[0\] is the assistant's: a chat begins with the user"),
        ([USER, {"role": "system", "content": "c"}], r"messages\[1\] is the system's: only the first"),
        ([{"role": "bot", "content": "c"}], r"messages\[0\].role is 'bot': give one of system, user"),
        ([{"content": "c"}], r"messages\[0\].role is missing"),
        ([{"role": "user"}], r"messages\[0\].content is missing: give text"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\].content is \[\{'type'"),
        ([7], r"messages\[0\] is 7: give a table"),
        ([USER, ASSISTANT] * MAX_MESSAGES, "has 2,000 entries: at most 1,000"),
    ],
)  # fmt: skip
def test_what_is_no_chat_is_refused(ours, messages, said):
    with pytest.raises(UserError, match=said) as caught:
        ours.chat(messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}", "the chat template is damaged .*line 1"),
        ("{{ raise_exception('Roles\nmust alternate') }}", r"does not take these messages \(Roles\)"),
        ("{{ messages[7].content.x.y }}", "does not take these messages"),
        ("{{ ''.__class__.__mro__ }}", "does not take these messages .*unsafe"),
        ("{{ messages.append(1) }}", "does not take these messages .*unsafe"),
        ("{{ 'x' * 999999999 }}", "does not take these messages .*multiplies"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "does not take these messages .*multiplies"),
        ("{% for i in range(999999999) %}{% endfor %}", "counts further than"),
        ("{% for i in range(90000) %}{{ 'x' * 9000 }}{% endfor %}", "writes more than"),
        ("{% for m in messages %}{{ messages | length }}{{ m.content }}{% endfor %}", "cannot be told"),
    ],
)
def test_templates_that_cannot_be_used(ours, template, said):
    tokenizer = ours.with_settings(TokenizerSettings(template))
    with pytest.raises(UserError, match=said) as caught:
        tokenizer.chat([USER, ASSISTANT])
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_nothing_that_ends_a_turn(byte_level, tmp_path):
    content = json.loads((byte_level() / "tokenizer.json").read_text())
    content["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="no chat template and no token that ends a text"):
        Tokenizer(tmp_path / "tokenizer.json").chat([USER])


def test_noncharacters_in_a_message_stay(ours):
    text = "a\ufdd0b\ufdd1<eos>"
    chat = ours.chat([{"role": "user", "content": text}])
    assert text in ours.decode(chat.ids)
