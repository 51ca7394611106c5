"""Instruction data: forms of rows, what is learnt of them and what is counted; packing leaks nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dualroute.cli import main
from dualroute.data.plan import Request
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.evaluate.load import load
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.tasks.config import TaskConfig
from dualroute.tasks.data.examples import Examples
from dualroute.tasks.data.module import PackedWindows, collate_examples
from dualroute.tasks.data.packing import PackedSequence
from dualroute.tasks.kind import BadRow, Setting
from dualroute.tasks.kinds.chat import Chats
from dualroute.training.monitoring.metrics_log import read_metrics
from dualroute.training.step.losses import chunked_cross_entropy

QUESTION, ANSWER = "where is the red bird", "under the old stone"
TURNS = [
    {"role": "user", "content": "who sees the river"},
    {"role": "assistant", "content": "the small bird"},
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ANSWER},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_dataset: Path) -> Tokenizer:
    return Tokenizer(tiny_dataset / "tokenizer.model")


def kind(tokenizer: Tokenizer, length: int = 256, too_long: str = "truncate", **task: Any) -> Chats:
    return Chats(TaskConfig(kind="chat", **task), Setting(tokenizer, length, True, too_long))


ONE = {
    "messages": {"messages": TURNS[2:]},
    "json": {"messages": json.dumps(TURNS[2:])},
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "prompt": {"prompt": QUESTION, "completion": ANSWER},
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "messages and more": {"messages": TURNS[2:], "prompt": "something else", "id": 3},
}


@pytest.mark.parametrize("form", ONE)
def test_all_forms_of_a_row_are_one_chat(tokenizer: Tokenizer, form: str) -> None:
    chats = kind(tokenizer)
    chats.check_columns(ONE[form])
    (example,) = chats.encode(ONE[form])
    expected = tokenizer.chat(TURNS[2:])
    assert [*example.fields["input_ids"].tolist(), expected.ids[-1]] == expected.ids
    assert chats.target(ONE[form]) == ANSWER
    assert chats.prompt(ONE[form]) == tokenizer.chat(TURNS[2:3], add_generation_prompt=True).ids


def test_answers_alone_are_learnt_in_every_turn(tokenizer: Tokenizer) -> None:
    (example,) = kind(tokenizer).encode({"messages": TURNS})
    ids, labels = example.fields["input_ids"].tolist(), example.fields["labels"].tolist()
    chat = tokenizer.chat(TURNS)
    assert [(token, token != -100) for token in labels] == [
        (token if wrote else -100, wrote) for token, wrote in zip(chat.ids[1:], chat.answer[1:], strict=True)
    ]
    assert ids == chat.ids[:-1]
    learnt = tokenizer.decode([token for token in labels if token != -100])
    assert "small bird" in learnt
    assert ANSWER in learnt
    assert "river" not in learnt
    assert tokenizer.eos_id in labels
    assert labels.count(tokenizer.eos_id) == 2  # each answer ends
    assert example.count_targets() == sum(chat.answer)


def test_input_and_system_are_part_of_the_question(tokenizer: Tokenizer) -> None:
    row = {"instruction": "count", "input": "a b c", "output": "3", "system": "be brief"}
    assert kind(tokenizer).messages(row) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "count\n\na b c"},
        {"role": "assistant", "content": "3"},
    ]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ("[{", "messages are no list"),
        (["hello"], "a message is no table of role and content"),
        ([{"role": "user"}], "the content of a message is no text"),
        ([{"role": "narrator", "content": "x"}], "unknown role \\('narrator'; known are system, developer"),
        ([TURNS[0], {"role": "assistant", "content": "  "}], "an empty answer"),
        ([{"role": "user", "content": ""}, TURNS[1]], "an empty message"),
        (TURNS[:1], "no answer of the assistant"),
        (TURNS[1:], "does not begin with the user"),
        ([*TURNS[:2], {"role": "system", "content": "x"}], "system that is not the first"),
        ([TURNS[0]] * 1001, "more than 1000 messages"),
    ],
)
def test_what_is_no_chat_is_left_out_for_a_reason(tokenizer: Tokenizer, messages: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        kind(tokenizer).encode({"messages": messages})


def test_turns_of_one_speaker_in_a_row_are_joined_and_counted(tokenizer: Tokenizer) -> None:
    chats = kind(tokenizer)
    split = [*TURNS[:2], {"role": "user", "content": "listen:"}, *TURNS[2:], TURNS[2]]
    assert chats.answered({"messages": split})[2]["content"] == f"listen:\n\n{QUESTION}"
    assert len(chats.answered({"messages": split})) == 4  # and a last question without an answer goes
    assert chats.tally.counts["chats in which turns of one speaker in a row were joined"] == 2


def test_too_long_chats_are_cut_dropped_or_refused(tokenizer: Tokenizer) -> None:
    whole = len(tokenizer.chat(TURNS).ids)
    cut = kind(tokenizer, whole - 10)
    (example,) = cut.encode({"messages": TURNS})
    assert len(example) == whole - 10
    assert cut.tally.counts.total() == 1
    with pytest.raises(BadRow, match="longer than"):
        kind(tokenizer, whole - 10, "drop").encode({"messages": TURNS})
    with pytest.raises(UserError, match=r"a row has \d+ tokens"):
        kind(tokenizer, whole - 10, "refuse").encode({"messages": TURNS})
    with pytest.raises(BadRow, match="no answer within the first 4 tokens"):
        kind(tokenizer, 4).encode({"messages": TURNS})


def test_a_prompt_without_room_loses_its_oldest_turns(tokenizer: Tokenizer) -> None:
    last = tokenizer.chat(TURNS[2:3], add_generation_prompt=True).ids
    assert kind(tokenizer, 2 * len(last) + 4).prompt({"messages": TURNS}) == last
    with pytest.raises(BadRow, match="a turn that is longer than"):
        kind(tokenizer, 8).prompt({"messages": TURNS})


def test_columns_that_make_no_chat_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="data has the columns 'text' and none of what makes a chat"):
        kind(tokenizer).check_columns(["text"])
    kind(tokenizer, columns={"messages": "text"}).check_columns(["text"])
    kind(tokenizer).check_columns(["prompt"], with_target=False)
    with pytest.raises(UserError, match="none of what makes a chat"):
        kind(tokenizer).check_columns(["prompt"])


def test_packed_chats_have_the_loss_that_each_has_alone(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = DualRoutingTransformer(
        ModelConfig(
            vocab_size=tokenizer.vocab_size, dim=32, num_layers=2, num_heads=4, window=8, block=16, top_k=1,
            global_mode="routed",
        )
    ).eval()  # fmt: skip
    chats = kind(tokenizer)
    rows = [{"messages": TURNS}, ONE["prompt"], {"messages": TURNS[:2]}, {"messages": TURNS}]
    examples = Examples((number, one) for number, row in enumerate(rows) for one in chats.encode(row))

    def loss(numbers: list[int], context: int) -> torch.Tensor:
        some = Examples((0, examples[number]) for number in numbers)
        plan = PackedSequence(some.lengths, some.targets, context)
        windows = PackedWindows(some, plan)
        batch = collate_examples([windows[Request(k, 1)] for k in range(plan.windows)])
        hidden = model.hidden_states(
            batch["input_ids"], segment_ids=batch["segment_ids"], positions=batch["positions"]
        )
        sums = chunked_cross_entropy(hidden.flatten(0, 1), model.head.weight, batch["labels"].flatten())
        assert int(sums.count) == int(some.targets.sum())
        return sums.total

    with torch.no_grad():
        packed = loss([0, 1, 2, 3], int(examples.lengths.sum()) + 5)
        alone = sum(loss([number], int(examples.lengths[number])) for number in range(4))
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-3)


def rows(count: int) -> list[dict[str, Any]]:
    """Questions whose answer is their own second word."""
    words = ["bird", "stone", "river", "house", "hill"]
    draw = np.random.default_rng(0)
    found = []
    for _ in range(count):
        first, second = (words[k] for k in draw.integers(5, size=2))
        ask = {"role": "user", "content": f"say {first} of {second}"}
        found.append({"messages": [ask, {"role": "assistant", "content": first}]})
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run, its rows): from scratch, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("chat")
    data = folder / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(400)))
    words = (
        "finetune --task.kind chat --model.dim 32 --model.num_layers 2 --model.num_heads 4 --model.block 16 "
        "--data.context 64 --train.micro_batch 2 --train.tokens_per_batch 256 --train.max_steps 60 "
        "--train.val_every_steps 60 --optim.lr 0.01 --optim.warmup_steps 4 --checkpoint.every_steps 60 "
        "--monitor.sample_every_steps 0 --monitor.peak_tflops 0.1"
    ).split()
    assert main([*words, "--data.path", str(data), "--output", str(folder / "run")]) == 0
    return folder / "run", data


@pytest.mark.slow
def test_a_run_learns_answers(trained: tuple[Path, Path]) -> None:
    run, _ = trained
    losses = [line["train/loss"] for line in read_metrics(run / "metrics.jsonl", "train")]
    assert losses[-1] < losses[0] / 2


def test_answers_are_written_after_the_prompt_and_end(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = trained
    some = tmp_path / "some.jsonl"
    some.write_text("".join(data.read_text().splitlines(keepends=True)[:8]))
    assert (
        main(["predict", "--checkpoint", str(run), "--input", str(some), "--output", str(tmp_path / "out")])
        == 0
    )
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert len(found) == 8
    assert all(len(row["prediction"].split()) <= 3 for row in found)
    assert load(run).tokenizer.eos_ids
