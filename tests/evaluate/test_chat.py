"""A chat in the terminal: its turns, its caches, its end; interrupts, pipes and a context that is full."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dualroute.cli import main
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.evaluate import chat
from dualroute.evaluate.conversation import Conversation, without_oldest
from dualroute.model import DualRoutingTransformer, ModelConfig, SamplingConfig
from dualroute.model.checkpoint.format import save_model
from dualroute.model.decoding.generation import generate

LONG = 4000


@pytest.fixture(scope="module")
def tokenizer(tiny_dataset: Path) -> Tokenizer:
    return Tokenizer(tiny_dataset / "tokenizer.model")


def model_of(tokenizer: Tokenizer, context: int = LONG, **more: Any) -> DualRoutingTransformer:
    torch.manual_seed(0)
    return DualRoutingTransformer(
        ModelConfig(
            vocab_size=tokenizer.vocab_size, dim=32, num_layers=2, num_heads=4, window=8, block=16, top_k=1,
            max_context=context, **more,
        )
    ).eval()  # fmt: skip


def talk(tokenizer: Tokenizer, context: int = LONG, new: int = 12, **more: Any) -> Conversation:
    return Conversation(model_of(tokenizer, context), tokenizer, SamplingConfig(new, temperature=0), **more)


def said(conversation: Conversation, text: str) -> str:
    return "".join(conversation.answer(text))


def alone(conversation: Conversation, messages: list[dict[str, Any]]) -> str:
    """The answer of a model that reads the whole chat at once."""
    ids = conversation.tokenizer.chat(messages, add_generation_prompt=True).ids
    new = []
    for token in generate(conversation.model, ids, conversation.sampling):
        if token in conversation.tokenizer.eos_ids:
            break
        new.append(token)
    return conversation.tokenizer.decode(new)


def test_each_answer_is_that_of_a_model_that_reads_the_whole_chat(tokenizer: Tokenizer) -> None:
    conversation = talk(tokenizer, system="be brief")
    for text in ("the old bird", "who?", "and the river"):
        before = [*conversation.messages, {"role": "user", "content": text}]
        assert said(conversation, text) == alone(conversation, before)
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", *["user", "assistant"] * 3]


def test_what_the_caches_hold_is_not_read_again(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = talk(tokenizer)
    answer = tokenizer.encode("the bird sleeps")
    script = iter([*answer, tokenizer.eos_id, *answer, tokenizer.eos_id])
    monkeypatch.setattr("dualroute.model.decoding.sampler.draw", lambda *_: next(script))
    assert said(conversation, "who sleeps") == "the bird sleeps"
    assert said(conversation, "and who else") == "the bird sleeps"
    whole = tokenizer.chat(conversation.messages[:3], add_generation_prompt=True).ids
    assert conversation.tokens_read == len(whole) + len(answer)


def test_it_stops_at_the_end_of_a_turn(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter([*tokenizer.encode("yes"), tokenizer.eos_id, 7, 7])
    monkeypatch.setattr("dualroute.model.decoding.sampler.draw", lambda *_: next(script))
    assert said(talk(tokenizer), "well") == "yes"
    assert list(script) == [7, 7]


def test_an_answer_ends_in_front_of_a_stop(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter([*tokenizer.encode("the old bird sleeps"), 7, 7])
    monkeypatch.setattr("dualroute.model.decoding.sampler.draw", lambda *_: next(script))
    conversation = talk(tokenizer, new=40)
    conversation.sampling = SamplingConfig(40, stop=[" bird"])
    assert said(conversation, "well") == "the old"
    assert conversation.messages[-1] == {"role": "assistant", "content": "the old"}
    assert next(script) != 7  # what comes later was not drawn


def test_a_full_context_forgets_the_oldest_turns(tokenizer: Tokenizer) -> None:
    conversation = talk(tokenizer, context=160, new=10, system="be kind")
    for number in range(6):
        said(conversation, f"bird {number}")
        assert conversation.messages[0]["role"] == "system"
        assert conversation.messages[1]["role"] == "user"
    assert conversation.left_out > 0
    assert conversation.messages[-2]["content"] == "bird 5"
    before = conversation.messages
    with pytest.raises(UserError, match=r"this turn has \d+ tokens .* reads at most 160"):
        said(conversation, "stone " * 100)
    assert conversation.messages == before


def test_the_oldest_turn_goes_with_its_answers() -> None:
    turns = [
        {"role": role, "content": str(k)} for k, role in enumerate(["system", "user", "assistant", "user"])
    ]
    assert [message["content"] for message in without_oldest(turns) or []] == ["0", "3"]
    assert without_oldest(turns[:3]) is None


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(tokenizer: Tokenizer) -> None:
    conversation = talk(tokenizer, new=30)
    pieces = conversation.answer("the old bird")
    first = next(pieces)
    pieces.close()
    assert conversation.messages[-1]["role"] == "assistant"
    assert conversation.messages[-1]["content"].startswith(first)
    before = [*conversation.messages, {"role": "user", "content": "go on"}]
    assert said(conversation, "go on") == alone(conversation, before)


def test_an_interrupt_in_a_layer_does_not_spoil_the_caches(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    conversation = talk(tokenizer, new=30)
    layer, calls = conversation.model.layers[1], []
    forward = layer.forward

    def interrupted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(*given, **named)

    monkeypatch.setattr(layer, "forward", interrupted)
    chat.answer(conversation, "the old bird", str)
    assert len(calls) == 4
    assert capsys.readouterr().out.endswith("\n")
    before = [*conversation.messages, {"role": "user", "content": "go on"}]
    assert said(conversation, "go on") == alone(conversation, before)


def test_commands_and_empty_lines(tokenizer: Tokenizer, capsys: Any) -> None:
    conversation = talk(tokenizer, new=3)
    script = iter(["", "the bird", "/reset", "/help", "who", "/quit", "never"])
    chat.talk(conversation, lambda: next(script, None), str)
    assert [message["content"] for message in conversation.messages if message["role"] == "user"] == ["who"]
    assert "/reset: begin a new chat" in capsys.readouterr().out
    assert next(script) == "never"


@pytest.fixture(scope="module")
def checkpoint(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    save_model(model_of(tokenizer), folder, tokenizer.path, {"origin": "a test"})
    return folder


def test_lines_of_a_pipe_are_turns(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the bird\n\nwho sleeps\n"))
    words = [
        "chat",
        "--checkpoint",
        str(checkpoint),
        "--sampling.max_new_tokens",
        "4",
        "--cache_dtype",
        "int8",
    ]
    assert main(words) == 0
    assert capsys.readouterr().out.count("\n") >= 2


def test_a_pipe_that_is_no_utf8_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As Python reads standard input where no locale is set: bytes that are no UTF-8 become surrogates."""
    stream = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", stream)
    assert main(["chat", "--checkpoint", str(checkpoint)]) == 2
    assert "standard input is not UTF-8 text" in capsys.readouterr().err


def test_a_model_that_writes_no_text_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads(json.dumps({"kind": "sequence", "labels": ["a", "b"]}))
    folder = tmp_path / "classes"
    save_model(model_of(tokenizer, task_head=config), folder, tokenizer.path, {"origin": "a test"})
    assert main(["chat", "--checkpoint", str(folder)]) == 2
    assert "use dualroute predict" in capsys.readouterr().err


def test_a_terminal_edits_lines_with_prompt_toolkit(tmp_path: Path) -> None:
    pytest.importorskip("prompt_toolkit", reason="pip install -e '.[chat]'")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        ask = chat.lines_of(True)
        typed.send_text("one\x1b\rtwo\r")  # Alt-Enter between them
        assert ask() == "one\ntwo"
        typed.send_text("wrong\x03right\r")  # Ctrl-C begins anew
        assert ask() == "right"
        typed.send_text("\x1b[A\r")  # the line before
        assert ask() == "right"
        typed.send_text("\x04")
        assert ask() is None
