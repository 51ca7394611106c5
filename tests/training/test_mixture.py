"""A training on two sources that is killed, and goes on on two ranks with other weights: the unbroken one."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from data_prep.prepare import PrepareConfig, prepare
from dualroute.cli import main
from dualroute.data.tokenizer import Tokenizer
from dualroute.evaluate.by_source import evaluate_sources, mixed, sources_of
from dualroute.evaluate.load import load_any
from dualroute.evaluate.perplexity import Score
from dualroute.model.checkpoint.folder import find_checkpoint
from dualroute.training.monitoring.metrics_log import read_metrics
from tests import warm
from tests.conftest import ROOT, write_corpus
from tests.training.step.test_module import GENTLE, SMALL, curve, environment

STEPS, STAGE = 16, "6144:one=0.25,two=0.75"  # in step 13


@pytest.fixture(scope="module")
def folders(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sources with one tokenizer."""
    root = tmp_path_factory.mktemp("sources")
    write_corpus(root / "corpus", documents=40, seed=5)
    tokenizer = str(tiny_dataset / "tokenizer.model")
    made = {"corpus": str(root / "corpus"), "output": str(root / "two"), "tokenizer": tokenizer}
    prepare(PrepareConfig(**made, val_fraction=0.1, progress=False))
    (root / "one").symlink_to(tiny_dataset)
    return [str(root / "one"), str(root / "two")]


def words(folders: list[str], output: Path, *more: str) -> list[str]:
    shares = [f"{folder}={share}" for folder, share in zip(folders, (0.75, 0.25), strict=True)]
    return [
        *("pretrain", *SMALL, *GENTLE, "--output", str(output), "--train.max_steps", str(STEPS)),
        *("--monitor.sample_every_steps", "0", "--data.sources", *shares, *more),
    ]


def figures(output: Path) -> dict[str, float]:
    return read_metrics(output / "metrics.jsonl", "validation")[-1]


@pytest.mark.slow
def test_killed_and_resumed_on_two_ranks_in_another_stage(folders: list[str], tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    stage = ("--data.stages", STAGE)
    result = warm.run(words(folders, whole, *stage), cwd=ROOT, env=environment())
    assert result.returncode == 0, result.stderr[-3000:]

    running = warm.Started(None, words(folders, broken), cwd=ROOT, env=environment())
    deadline = time.monotonic() + 120
    while not (broken / "checkpoints" / "step-00000008").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.kill()
    at = find_checkpoint(broken).step
    assert 8 <= at < STEPS

    refused = warm.run(words(folders[::-1], broken), cwd=ROOT, env=environment())
    assert refused.returncode == 2
    assert "was trained from the beginning on one 0.75, two 0.25" in refused.stderr
    assert f"data.stages: [{{from_tokens: {512 * at}, weights: {{" in refused.stderr

    ranks = words(folders, broken, *stage, "--parallel.strategy", "ddp")
    warm.ranks(2, str(ROOT / "dualroute" / "__main__.py"), ranks, cwd=ROOT, env=environment())
    losses, resumed = curve(whole), curve(broken)
    assert {step: resumed[step] for step in range(1, at + 1)} == {
        step: losses[step] for step in range(1, at + 1)
    }
    assert [resumed[step] for step in range(1, STEPS + 1)] == pytest.approx(
        [losses[step] for step in range(1, STEPS + 1)], rel=2e-5
    )
    for name in ("one", "two"):
        tag = f"val/loss_by_source/{name}"
        assert figures(broken)[tag] == pytest.approx(figures(whole)[tag], rel=2e-5)
    last = read_metrics(broken / "metrics.jsonl", "train")[-1]
    assert last["data/tokens_by_source/one"] == 96 * 48 + 32 * 16  # of 96 samples before and 32 in the stage
    assert last["data/tokens_by_source/two"] == 96 * 16 + 32 * 48
    lines = [json.loads(line) for line in (broken / "mixture.jsonl").read_text().splitlines()]
    assert [(line["from_tokens"], line["weights"], line["written_at_step"]) for line in lines] == [
        (0, {"one": 0.75, "two": 0.25}, 0),
        (6144, {"one": 0.25, "two": 0.75}, at),
    ]

    loaded = load_any(str(broken), "cpu", "auto")
    sources = sources_of(loaded)
    assert [(source.called, source.weight) for source in sources] == [("one", 0.25), ("two", 0.75)]
    mixture, scores = evaluate_sources(loaded, sources, "val", 64, 4, 512)
    for name, score in scores.items():  # what the last validation found
        assert score.loss == pytest.approx(figures(broken)[f"val/loss_by_source/{name}"], rel=1e-4)
    assert mixture.loss == pytest.approx(0.25 * scores["one"].loss + 0.75 * scores["two"].loss)


def test_the_checkpoint_has_the_template_of_a_source_of_chats(folders: list[str], tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    model = shutil.copy(Path(folders[0]) / "tokenizer.model", tmp_path / "tokenizer")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    turns = [
        [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}."}]
        for n in range(90)
    ]
    rows = "".join(json.dumps({"messages": messages}) + "\n" for messages in turns)
    (tmp_path / "chats.jsonl").write_text(rows)
    made = {"corpus": str(tmp_path / "chats.jsonl"), "output": str(tmp_path / "chats"), "tokenizer": model}
    prepare(PrepareConfig(**made, text_key="messages", chats=True, val_fraction=0.3, progress=False))
    run = tmp_path / "run"
    told = words([folders[0], made["output"]], run)
    told[told.index("--train.max_steps") + 1] = "6"
    assert main(told) == 0
    assert Tokenizer(find_checkpoint(run).folder / "tokenizer.model").settings.chat_template == template


def test_a_mixture_scores_what_text_mixed_so_would() -> None:
    scores = {"a": Score(2.0, 300, 900.0), "b": Score(4.0, 100, 100.0)}
    score = mixed(scores, {"a": 0.5, "b": 0.5})  # one target of each: 6 nats, 3 + 1 bytes
    assert score.loss == 3
    assert score.bits_per_byte == pytest.approx(6 / 4 / 0.6931471805599453)
