"""Each kind: what it makes of rows, what it makes of outputs, and that it learns."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dualroute.cli import main
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.tasks.config import TaskConfig
from dualroute.tasks.data.spans import encoded_with_places, units
from dualroute.tasks.data.tokenizers import trained
from dualroute.tasks.kind import BadRow, Part, Setting, find_kind, kind_names, shortened
from dualroute.tasks.kinds.token import entities
from dualroute.tasks.losses import classification, within_segments
from dualroute.training.monitoring.metrics_log import read_metrics
from tests.tasks.made import BAD, FILLER, GOOD, finetune, write_jsonl


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(trained([" ".join([*FILLER, *GOOD, *BAD])] * 3, None))
    return Tokenizer(path)


def made(name: str, tokenizer: Tokenizer, length: int = 64, causal: bool = True, **task: Any) -> Any:
    return find_kind(name)(TaskConfig(kind=name, **task), Setting(tokenizer, length, causal))


def test_kinds_are_the_files_and_each_says_its_columns_and_metric() -> None:
    assert {"sequence", "number", "token", "span", "text"} <= set(kind_names())
    for name in kind_names():
        kind = find_kind(name)
        assert kind.name == name
        assert kind.roles
        assert kind.metrics
        assert kind.__doc__ or __import__(kind.__module__, fromlist=["x"]).__doc__


# ---------------------------------------------------------------------- sequence, number


@pytest.mark.parametrize(
    ("causal", "pooling", "place"), [(True, "auto", -1), (False, "auto", 0), (True, "mean", -1)]
)
def test_a_text_has_its_one_output_where_it_has_been_read(
    causal: bool, pooling: str, place: int, tokenizer: Tokenizer
) -> None:
    kind = made("sequence", tokenizer, causal=causal, pooling=pooling)
    kind.fit([{"text": "a", "label": 1}, {"text": "b", "label": "0"}, {"text": "c", "label": 1.0}])
    assert kind.labels == ["0", "1"]  # 1, 1.0 and "1" are one label
    (example,) = kind.encode({"text": "the film", "label": 1})
    assert example.fields["outputs"].sum() == 1
    assert example.fields["outputs"][place]
    assert example.fields["labels"][place] == 1
    assert (example.fields["labels"] >= 0).sum() == 1
    assert example.fields["input_ids"][0] == tokenizer.bos_id


def test_a_pair_is_cut_where_it_is_longest(tokenizer: Tokenizer) -> None:
    assert shortened([[1] * 10, [2] * 3], 8) == [[1] * 5, [2] * 3]
    assert shortened([[1] * 10, [2] * 9], 8) == [[1] * 4, [2] * 4]
    kind = made("sequence", tokenizer, length=16)
    kind.fit([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    (example,) = kind.encode({"text": "the film was fine " * 9, "pair": "cold", "label": "x"})
    ids = example.fields["input_ids"].tolist()
    assert len(ids) == 16
    assert ids.count(tokenizer.eos_id) == 2
    assert tokenizer.decode(ids).endswith("cold")
    assert kind.tally.counts.total() == 1


def test_balanced_weights_have_a_mean_of_one_over_the_training_targets(tokenizer: Tokenizer) -> None:
    kind = made("sequence", tokenizer, class_weights="balanced")
    labels = ["a"] * 9 + ["b"] * 3
    kind.fit([{"text": "t", "label": label} for label in labels])
    weights = dict(zip(kind.labels, kind.class_weights, strict=True))
    assert weights["b"] == pytest.approx(3 * weights["a"])
    assert np.mean([weights[label] for label in labels]) == pytest.approx(1.0)


def test_the_loss_is_torchs_with_weights_and_smoothing() -> None:
    torch.manual_seed(0)
    outputs, labels = torch.randn(7, 4, requires_grad=True), torch.tensor([0, 3, -100, 1, 2, 2, 0])
    sums = classification(outputs, labels, smoothing=0.1)
    torch_loss = torch.nn.functional.cross_entropy(outputs, labels, reduction="sum", label_smoothing=0.1)
    assert sums.total.item() == pytest.approx(torch_loss.item(), rel=1e-5)
    assert int(sums.count) == 6
    weights = [0.5, 2.0, 1.0, 1.5]
    weighted = classification(outputs, labels, weights=weights).total
    torch_loss = torch.nn.functional.cross_entropy(outputs, labels, torch.tensor(weights), reduction="sum")
    assert weighted.item() == pytest.approx(torch_loss.item(), rel=1e-5)


def test_numbers_are_learnt_in_units_of_their_deviation(tokenizer: Tokenizer) -> None:
    kind = made("number", tokenizer)
    kind.fit([{"text": "a", "label": 10}, {"text": "b", "label": "30"}, {"text": "b", "label": "none"}])
    (example,) = kind.encode({"text": "a", "label": 30})
    assert np.nanmax(example.fields["numbers"]) == pytest.approx(1.0)
    assert kind.reduce(np.array([[1.0]], np.float32), example) == pytest.approx(30.0)
    with pytest.raises(BadRow, match="label is no number"):
        kind.encode({"text": "a", "label": "nan"})


# ---------------------------------------------------------------------- token


def test_a_word_has_its_output_where_it_is_read(tokenizer: Tokenizer) -> None:
    row = {"tokens": ["the", "unheardof", "city"], "tags": ["O", "B-x", "O"]}
    for causal in (True, False):
        kind = made("token", tokenizer, causal=causal)
        kind.fit([row])
        (example,) = kind.encode(row)
        places = np.flatnonzero(example.fields["outputs"])
        assert len(places) == 3
        assert example.fields["labels"][places].tolist() == [0, 1, 0]
        pieces = len(tokenizer.encode(" unheardof"))
        assert pieces > 1
        assert places[1] - places[0] == (pieces if causal else 1)
        found = kind.decode(row, [Part(example, [0, 1, 0])])
        assert found["prediction"] == row["tags"]
        assert found["entities"] == [{"type": "x", "text": "unheardof", "start": 1, "end": 2}]
    kind = made("token", tokenizer, length=4)
    kind.fit([row])
    (example,) = kind.encode(row)
    assert kind.decode(row, [Part(example, [1])])["prediction"] == ["B-x", "O", "O"]  # cut off
    with pytest.raises(BadRow, match="not as many"):
        kind.encode({**row, "tags": ["O"]})


def test_entities_are_read_as_conlleval_reads_them() -> None:
    assert entities(["B-a", "I-a", "I-b", "O", "I-a", "B-a"]) == [
        ("a", 0, 2),
        ("b", 2, 3),
        ("a", 4, 5),
        ("a", 5, 6),
    ]


# ---------------------------------------------------------------------- span


@pytest.mark.parametrize(
    "text", ["the film was fine , and warm.", "  two  spaces", "中文，abc 混合。", "naïve 🙂 x"]
)
def test_characters_of_pieces_spell_the_text(text: str, tokenizer: Tokenizer) -> None:
    ids, places = encoded_with_places(tokenizer, text)
    assert len(ids) == len(places)
    covered = {k for start, end in places for k in range(start, end)}
    assert {k for k, character in enumerate(text) if not character.isspace()} <= covered
    for word in units(text):
        start = text.index(word)
        inside = [place for place in places if place[0] < start + len(word) and place[1] > start]
        assert inside[0][0] <= start
        assert inside[-1][1] >= start + len(word)


CONTEXT = "the story was in a city . some actors was fine and the film was warm"


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([{"text": "fine", "answer_start": CONTEXT.index("fine")}], "fine"),
        ({"text": ["warm"], "answer_start": [CONTEXT.index("warm")]}, "warm"),
        ([{"text": "some actors", "answer_start": 3}], "some actors"),  # repaired: it is there once
        ("a city", "a city"),
        (["nowhere", "a city"], "a city"),
    ],
)
def test_an_answer_is_found_at_its_characters(answers: Any, said: str, tokenizer: Tokenizer) -> None:
    kind = made("span", tokenizer, length=40, stride=8)
    row = {"question": "the film", "context": CONTEXT, "answers": answers}
    examples = kind.encode(row)
    assert sum(map(len, examples)) > len(CONTEXT.split())
    right = []
    for example in examples:
        outputs = np.zeros((int(example.fields["outputs"].sum()), 2), np.float32)
        labels = example.fields["labels"][example.fields["outputs"]]
        outputs[labels & 1 > 0, 0] = outputs[labels & 2 > 0, 1] = 5.0  # a model that knows
        right.append(Part(example, kind.reduce(outputs, example)))
    found = kind.decode(row, right)
    assert found["prediction"] == said
    assert CONTEXT[found["start"] : found["end"]] == said
    assert kind.tally.counts.total() == (2 if "some actors" in str(answers) else 0)  # counted, and repaired


def test_answers_that_are_not_there_leave_the_row_out(tokenizer: Tokenizer) -> None:
    kind = made("span", tokenizer)
    twice = {"question": "q", "context": CONTEXT, "answers": [{"text": "was", "answer_start": 0}]}
    for answers, reason in (
        (twice["answers"], "exactly once"),
        ([], "no answers"),
        ("nowhere", "exactly once"),
    ):
        with pytest.raises(BadRow, match=reason):
            kind.encode({**twice, "answers": answers})


def test_the_loss_of_spans_is_a_softmax_over_each_text() -> None:
    torch.manual_seed(0)
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]])
    rows = torch.tensor([0, 1, 2, 3, 4, 6, 7, 8, 9])
    outputs = torch.randn(9, 2, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 0, 0, 1, 0, 2])
    sums = within_segments(outputs, labels, (1, 2), segments, rows)
    expected = torch.zeros(())
    for where, starts, ends in (((0, 3), 1, 2), ((3, 5), 0, 0), ((5, 9), 1, 3)):
        part = outputs[where[0] : where[1]]
        expected = expected - (part[:, 0].log_softmax(0)[starts] + part[:, 1].log_softmax(0)[ends]) / 2
    assert sums.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert int(sums.count) == 3
    sums.total.backward()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()


# ---------------------------------------------------------------------- text


def test_only_the_answer_and_its_end_are_learnt(tokenizer: Tokenizer) -> None:
    kind = made("text", tokenizer, prompt="say {source}:")
    (example,) = kind.encode({"source": "the film", "answer": "fine"})
    ids, labels = example.fields["input_ids"].tolist(), example.fields["labels"].tolist()
    learnt = [label for label in labels if label != -100]
    assert learnt == [*tokenizer.encode("fine"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "say the film:fine"
    assert labels.index(learnt[0]) == len(kind.prompt({"source": "the film"})) - 1


@pytest.mark.parametrize("keep", ["beginning", "end"])
def test_a_prompt_keeps_its_template_when_a_column_is_too_long(keep: str, tokenizer: Tokenizer) -> None:
    kind = made("text", tokenizer, length=48, prompt="say {source}:", keep=keep, max_new_tokens=8)
    text = " ".join(["superb", *["film"] * 90, "grim"])
    said = tokenizer.decode(kind.prompt({"source": text}))
    assert said.startswith("say ")
    assert said.endswith(":")
    assert ("superb" in said) == (keep == "beginning")
    assert ("grim" in said) == (keep == "end")
    assert kind.tally.counts.total() == 1


@pytest.mark.parametrize("prompt", ["no column", "{answer}", "{source", "{source.name}", "{}"])
def test_a_prompt_that_is_no_template_is_refused(prompt: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"task\.prompt"):
        made("text", tokenizer, prompt=prompt)


# ---------------------------------------------------------------------- learning


def rows_of(kind: str, count: int = 300) -> list[dict[str, Any]]:
    """Rows that a small model learns in seconds."""
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        words = draw.choices(FILLER, k=5)
        special, place = draw.choice(GOOD + BAD), draw.randint(0, 5)
        mood = special in GOOD
        words.insert(place, special)
        rows.append(
            {
                "number": {"text": " ".join(words), "label": 40.0 if mood else 10.0},
                "token": {"tokens": words, "tags": ["B-mood" if word == special else "O" for word in words]},
                "span": {"question": "which", "context": " ".join(words), "answers": special},
                "text": {"source": " ".join(words), "answer": "good" if mood else "bad"},
            }[kind]
        )
    return rows


@pytest.mark.parametrize(
    ("kind", "metric", "above"),
    [
        ("number", "spearman", 0.8),
        pytest.param("token", "f1", 0.9, marks=pytest.mark.slow),
        pytest.param("span", "f1", 0.8, marks=pytest.mark.slow),
        pytest.param("text", "exact_match", 0.9, marks=pytest.mark.slow),
    ],
)
def test_a_kind_learns_and_answers(kind: str, metric: str, above: float, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", rows_of(kind))
    options = ("--task.kind", kind, "--task.max_new_tokens", "4", "--task.stride", "4")
    if kind == "text":
        options += ("--task.metric", metric, "--task.metric_rows", "99")
    assert (
        finetune(data, tmp_path / "run", *options, "--train.max_steps", "60", "--train.val_every_steps", "30")
        == 0
    )
    validations = read_metrics(tmp_path / "run" / "metrics.jsonl", "validation")
    best = max(line[f"val/{metric}"] for line in validations)
    assert best > above
    assert (
        main(["evaluate", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "score.json")])
        == 0
    )
    metrics = json.loads((tmp_path / "score.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics[metric] > above
    if kind == "text":
        assert metrics[metric] == pytest.approx(best, abs=1e-6), "of the best checkpoint, on the same rows"
        assert metrics["perplexity"] < 2.0
