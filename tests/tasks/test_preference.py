"""Direct preference optimisation: the formula, the reference that is asked once, and runs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dualroute.cli import main
from dualroute.data.plan import Request
from dualroute.data.tokenizer import Tokenizer
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import find_checkpoint, load_model, save_model
from dualroute.tasks.config import TaskConfig
from dualroute.tasks.data.examples import Examples
from dualroute.tasks.data.module import PackedWindows, collate_examples
from dualroute.tasks.data.packing import PackedSequence
from dualroute.tasks.dpo import reference as reference_module
from dualroute.tasks.dpo.loss import preference_sums
from dualroute.tasks.dpo.reference import FILE, lay_out, reference_scores
from dualroute.tasks.kind import BadRow, Setting
from dualroute.tasks.kinds.preference import Preferences
from dualroute.training.monitoring.metrics_log import read_metrics
from tests import warm
from tests.conftest import ROOT
from tests.training.checkpointing.runs import killed_in
from tests.training.step.test_module import curve, environment

PAIRS = [
    {"prompt": "where is the red bird", "chosen": "under the old stone", "rejected": "over"},
    {"prompt": "who sleeps", "chosen": "a small river", "rejected": "the house and the hill"},
    {"prompt": "who sees", "chosen": "the bird", "rejected": "the stone"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_dataset: Path) -> Tokenizer:
    return Tokenizer(tiny_dataset / "tokenizer.model")


def kind(tokenizer: Tokenizer, length: int = 256, too_long: str = "truncate", **task: Any) -> Preferences:
    return Preferences(TaskConfig(kind="preference", **task), Setting(tokenizer, length, True, too_long))


def model_of(tokenizer: Tokenizer, seed: int = 0) -> DualRoutingTransformer:
    torch.manual_seed(seed)
    return DualRoutingTransformer(
        ModelConfig(
            vocab_size=tokenizer.vocab_size, dim=32, num_layers=2, num_heads=4, window=8, block=16, top_k=1,
            global_mode="routed",
        )
    ).eval()  # fmt: skip


def log_probability(
    model: DualRoutingTransformer, tokenizer: Tokenizer, pair: dict[str, str], side: str
) -> Any:
    """log p of an answer and the end of its turn, given the prompt; alone, token by token."""
    ask = {"role": "user", "content": pair["prompt"]}
    chat = tokenizer.chat([ask, {"role": "assistant", "content": pair[side]}])
    logs = model(torch.tensor([chat.ids[:-1]])).log_softmax(-1)[0]
    return sum(
        logs[place, token]
        for place, (token, wrote) in enumerate(zip(chat.ids[1:], chat.answer[1:], strict=True))
        if wrote
    )


def batch_of(examples: Examples, context: int) -> dict[str, Any]:
    plan = PackedSequence(examples.lengths, examples.targets, context)
    windows = PackedWindows(examples, plan)
    return collate_examples([windows[Request(k, 1)] for k in range(plan.windows)])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradient_are_the_formula_in_float64(tokenizer: Tokenizer, smoothing: float) -> None:
    """Packed and chunked, against every answer alone through autograd."""
    model, other = model_of(tokenizer).double(), model_of(tokenizer, 1).double()
    examples = Examples((n, e) for n, pair in enumerate(PAIRS) for e in kind(tokenizer).encode(pair))
    scores = reference_scores(other, examples, 200, 2)
    sides = ("chosen", "rejected")
    with torch.no_grad():
        expected = [
            [float(log_probability(other, tokenizer, pair, side)) for side in sides] for pair in PAIRS
        ]
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected, dtype=torch.float64))

    beta, losses, margins = 0.7, [], []
    for pair, (first, second) in zip(PAIRS, expected, strict=True):
        ours = [log_probability(model, tokenizer, pair, side) for side in sides]
        margin = beta * ((ours[0] - first) - (ours[1] - second))
        likely = torch.sigmoid(margin)
        losses.append(-(1 - smoothing) * likely.log() - smoothing * (1 - likely).log())
        margins.append(margin.item())
    sum(losses).backward()
    wanted = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()

    lay_out(examples, scores)
    batch = batch_of(examples, 200)
    hidden = model.hidden_states(
        batch["input_ids"], segment_ids=batch["segment_ids"], positions=batch["positions"]
    )
    sums = preference_sums(hidden.flatten(0, 1), model.head.weight, batch, beta=beta, smoothing=smoothing)
    assert int(sums.count) == 3
    torch.testing.assert_close(sums.total.detach(), sum(losses).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(float(sums.margin), sum(margins), rtol=1e-5, atol=1e-5)
    assert int(sums.correct) == sum(margin > 0 for margin in margins)
    sums.total.backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, wanted[name], rtol=1e-5, atol=1e-7)


def test_a_batch_of_padding_is_no_pair(tokenizer: Tokenizer) -> None:
    """Where windows do not divide by the ranks, one of them has such a batch."""
    model = model_of(tokenizer)
    nothing = torch.zeros(2, 16, dtype=torch.int64)
    batch = {"labels": nothing - 100, "segment_ids": nothing, "reference": nothing.double()}
    sums = preference_sums(torch.randn(32, 32), model.head.weight, batch, beta=0.1, smoothing=0.0)
    assert (int(sums.count), float(sums.loss_sum), sums.total.item()) == (0, 0.0, 0.0)


def test_a_pair_is_two_documents_that_do_not_see_each_other(tokenizer: Tokenizer) -> None:
    (example,) = kind(tokenizer).encode(PAIRS[0])
    lengths = [int((example.fields["parts"] == part).sum()) for part in (0, 1)]
    assert example.count_targets() == 1
    batch = batch_of(Examples([(0, example), (1, example)]), 2 * sum(lengths) + 3)
    runs = torch.unique_consecutive(batch["segment_ids"][0], return_counts=True)
    assert runs[0].tolist() == [1, 2, 3, 4, 0]
    assert runs[1].tolist() == [*lengths, *lengths, 3]
    assert batch["positions"][0, : lengths[0] + 2].tolist() == [*range(lengths[0]), 0, 1]


ASK = {"role": "user", "content": PAIRS[0]["prompt"]}
CHATS = {name: [ASK, {"role": "assistant", "content": PAIRS[0][name]}] for name in ("chosen", "rejected")}


@pytest.mark.parametrize(
    "row",
    [
        CHATS,
        {"prompt": [ASK], **{name: chat[1:] for name, chat in CHATS.items()}},
        {"prompt": [ASK], "chosen": PAIRS[0]["chosen"], "rejected": PAIRS[0]["rejected"]},
    ],
    ids=["whole chats", "messages", "texts after messages"],
)
def test_all_forms_of_a_pair_are_one(tokenizer: Tokenizer, row: dict[str, Any]) -> None:
    (ours,), (theirs,) = kind(tokenizer).encode(row), kind(tokenizer).encode(PAIRS[0])
    for name, values in theirs.fields.items():
        assert ours.fields[name].tolist() == values.tolist()


def test_equal_sides_are_counted_and_dropped(tokenizer: Tokenizer) -> None:
    pairs = kind(tokenizer)
    twice = kind(tokenizer)
    twice.encode({**PAIRS[0], "prompt": [ASK, {"role": "user", "content": "say it"}]})
    assert set(twice.tally.counts) == {"chats in which turns of one speaker in a row were joined"}
    assert pairs.encode({**PAIRS[0], "rejected": PAIRS[0]["chosen"]}) == []
    assert pairs.tally.counts["left out, because both sides of the pair are equal"] == 1
    short = kind(tokenizer, 140)
    long = " ".join(["under the old stone"] * 30)
    assert short.encode({"prompt": "who", "chosen": long, "rejected": f"{long} bird"}) == []
    assert "cut: each side of a pair may have 70 tokens, half of data.max_length" in short.tally.counts
    assert short.tally.counts["left out, because what fits of both sides of the pair is equal"] == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**PAIRS[0], "chosen": ""}, "empty chosen"),
        ({**PAIRS[0], "rejected": None}, "no rejected"),
        ({"chosen": "x", "rejected": "y"}, "no prompt"),
        ({**CHATS, "rejected": [{**ASK, "content": "another"}, CHATS["rejected"][1]]}, "different chats"),
        ({**CHATS, "rejected": [ASK]}, "rejected does not end with an answer"),
    ],
)
def test_what_is_no_pair_is_left_out_for_a_reason(tokenizer: Tokenizer, row: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        kind(tokenizer).encode(row)


@pytest.fixture(scope="module")
def parent(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent") / "model"
    save_model(model_of(tokenizer), folder, tokenizer.path, {"origin": "a test"})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shorter answer is the better one."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    words = ["bird", "stone", "river", "house", "hill", "small", "green"]
    rows = [{"prompt": f"say {a}", "chosen": b, "rejected": f"{b} and the {a}"} for a in words for b in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_of(parent: Path, data: Path, output: Path, steps: int, *more: str) -> list[str]:
    words = (
        "finetune --task.kind preference --data.context 128 --data.validation_share 0.2 "
        "--train.micro_batch 2 --train.tokens_per_batch 256 --train.val_every_steps 50 "
        "--optim.lr 0.003 --optim.warmup_steps 2 --checkpoint.every_steps 4 "
        "--monitor.sample_every_steps 0 --monitor.peak_tflops 0.1 --monitor.log_every_steps 1"
    ).split()
    said = ["--init_from", str(parent), "--data.path", str(data), "--output", str(output)]
    return [*words, *said, "--train.max_steps", str(steps), *more]


def train(*arguments: Any) -> int:
    return main(words_of(*arguments))


@pytest.fixture(scope="module")
def run(parent: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("dpo") / "run"
    assert train(parent, data, output, 12) == 0
    return output


def test_a_run_begins_at_the_reference_and_learns_the_preference(run: Path) -> None:
    lines = read_metrics(run / "metrics.jsonl", "train")
    assert lines[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["train/margin"] == pytest.approx(0, abs=1e-4)
    before, *_, after = read_metrics(run / "metrics.jsonl", "validation")
    assert before["val/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert after["val/accuracy"] > 0.9
    assert after["val/margin"] > 0
    assert find_checkpoint(run).metadata["score"]["name"] == "accuracy"


def test_its_answers_are_compared_with_the_better_ones(run: Path, data: Path, tmp_path: Path) -> None:
    some = tmp_path / "some.jsonl"
    some.write_text("".join(data.read_text().splitlines(keepends=True)[:4]))
    figures = tmp_path / "figures.json"
    asked = ["evaluate", "--checkpoint", str(run), "--data", str(some), "--output", str(figures)]
    assert main(asked) == 0
    metrics = json.loads(figures.read_text())["metrics"]
    assert {"bleu", "exact_match", "perplexity"} <= metrics.keys()
    assert metrics["perplexity"] > 1


def test_the_reference_is_asked_once_and_the_parent_may_go(
    run: Path, parent: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    other, output = tmp_path / "parent", tmp_path / "run"
    shutil.copytree(parent, other)
    with killed_in(7):
        train(other, data, output, 12)
    assert (output / FILE).is_file()
    shutil.rmtree(other)

    def never(*_: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(reference_module, "reference_scores", never)
    assert train(other, data, output, 12) == 0
    assert curve(output) == curve(run)
    theirs = load_model(find_checkpoint(run)).state_dict()
    ours = load_model(find_checkpoint(output)).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    (output / FILE).write_bytes(b"damaged")
    capsys.readouterr()
    assert train(other, data, output, 14) == 2
    assert f"the run has no {FILE} of these pairs" in capsys.readouterr().err


def test_adapters_learn_preferences_too(parent: Path, data: Path, tmp_path: Path) -> None:
    assert (
        train(
            parent,
            data,
            tmp_path / "run",
            6,
            "--finetune.adapter",
            "lora",
            "--optim.lr",
            "0.01",
            "--task.metric",
            "margin",
        )
        == 0
    )
    assert find_checkpoint(tmp_path / "run").metadata["score"]["name"] == "margin"
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl", "train")
    assert lines[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--init_from", "null", "--model.dim", "32"], "give init_from"),
        (["--train.z_loss", "0.1"], "train.z_loss has no meaning"),
        (["--task.beta", "0"], "task.beta is 0"),
        (["--task.metric", "bleu"], "task.metric is bleu"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    parent: Path, data: Path, tmp_path: Path, capsys: Any, more: list[str], said: str
) -> None:
    assert train(parent, data, tmp_path / "run", 4, *more) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_where_no_pair_is_left_the_reason_is_said(parent: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {number}", "chosen": "a", "rejected": "a"} for number in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train(parent, path, tmp_path / "run", 4) == 2
    assert "both sides of the pair are equal" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_two_ranks_have_the_losses_of_one(
    parent: Path, data: Path, run: Path, tmp_path: Path, strategy: str
) -> None:
    """With ZeRO-3 the reference is asked of the model that is trained, before its first step."""
    how = ["--parallel.strategy", "ddp" if strategy == "ddp" else "deepspeed"]
    if strategy != "ddp":
        pytest.importorskip("deepspeed")
        how += ["--parallel.zero_stage", strategy[-1]]
    output = tmp_path / "run"
    how += ["--train.micro_batch", "1"]
    words = words_of(parent, data, output, 12, *how)[1:]
    warm.ranks(2, "launch/finetune.py", words, cwd=ROOT, env=environment())
    ours, theirs = curve(output), curve(run)
    assert ours.keys() == theirs.keys()
    assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=2e-4)
    if strategy == "zero3":
        (output / FILE).unlink()
        words = words_of(parent, data, output, 14, *how)
        found = warm.run(words, cwd=ROOT, env=environment())
        assert found.returncode == 2
        assert "resume once with stage 2" in found.stderr.strip().splitlines()[-1]
