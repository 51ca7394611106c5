"""Every key of every section, changed between a checkpoint and its resume: obeyed, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dualroute.cli import main
from dualroute.distillation.config import RESUME_RULES, DistillConfig
from dualroute.errors import UserError
from dualroute.model.checkpoint.format import Checkpoint, find_checkpoint
from dualroute.tasks.config import RESUME_RULES as OF_TASKS
from dualroute.tasks.config import FinetuneConfig
from dualroute.training.checkpointing.publishing.upkeep import best_by_validation
from dualroute.training.checkpointing.resumed_settings import RULES, learning_rate_note
from dualroute.training.checkpointing.state.layout import StateLayout
from dualroute.training.checkpointing.state.reshard import refuse_other_precision, saved_precision
from dualroute.training.config import PretrainConfig, TrainConfig
from dualroute.training.monitoring.metrics_log import read_metrics
from dualroute.training.optim_config import OptimConfig
from dualroute.training.step.token_count import TokenCount
from tests import warm
from tests.conftest import ROOT
from tests.sealed import rewrite
from tests.training.step.test_module import GENTLE, SMALL, environment

STEPS, MORE = 6, 9


def keys(cls: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a configuration class, ``data.path`` and so on."""
    for field in dataclasses.fields(cls):
        default = (
            field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        )
        if dataclasses.is_dataclass(default):
            yield from keys(type(default), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def rule_of(key: str, rules: dict[str, str]) -> str:
    found = [rules[name] for name in {key, key.split(".")[0]} if name in rules]
    assert len(found) == 1, f"{key} has {len(found)} rules: every key is to have one"
    return found[0]


def documented() -> dict[str, str]:
    """{key or section: rule} of the table in docs/training.md."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = text.split("| changed on resume | what happens |", 1)[1].split("\n\n", 1)[0]
    found = {}
    for row in table.splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if len(cells) == 2 and "`" in cells[0]:
            found |= dict.fromkeys(re.findall(r"`([\w.]+)`", cells[0]), cells[1].split()[0].strip(":,;"))
    return found


def test_every_key_has_one_rule_and_the_page_says_the_same() -> None:
    described = documented()
    for cls, more in ((DistillConfig, RESUME_RULES), (FinetuneConfig, OF_TASKS)):
        rules = {**RULES, **more}
        for key in keys(cls):
            assert rule_of(key, described) == rule_of(key, rules), key
        for name in rules:
            assert any(key == name or key.startswith(f"{name}.") for key in keys(cls)), f"no key {name}"
    assert {key for key in keys(PretrainConfig) if rule_of(key, RULES)} == set(keys(PretrainConfig))


def arguments(dataset: Path, output: Path, steps: int, *more: str) -> list[str]:
    return [
        *("pretrain", *SMALL, "--data.path", str(dataset), "--output", str(output)),
        *("--monitor.sample_every_steps", "0", "--train.max_steps", str(steps), *more),
    ]


@pytest.fixture(scope="module")
def finished(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    assert main(arguments(tiny_dataset, output, STEPS)) == 0
    return output


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("[!.]*") if path.is_file()}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--seed", "3"), "seed was 0 and is 3"),
        (("--data.context", "32"), "data.context was 64 and is 32"),
        (("--optim.decay_embeddings", "true"), "optim.decay_embeddings was false and is true"),
        (("--model.window", "16"), "model.window 8 → 16"),
        (("--seed", "3", "--optim.decay_embeddings", "true"), "seed was 0 and is 3; optim.decay_embeddings"),
    ],
)
def test_what_cannot_change_is_refused_with_both_values(
    more: tuple[str, ...],
    message: str,
    finished: Path,
    tiny_dataset: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = files(finished)
    assert main(arguments(tiny_dataset, finished, MORE, *more)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert files(finished) == before


def state_of(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(find_checkpoint(run).state, map_location="cpu", weights_only=True)
    return state


def test_the_optimizer_obeys_what_it_is_told_on_resume(
    finished: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    """The state that is loaded holds the old values; what is trained with, and saved, are the new ones."""
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    new = ["--optim.weight_decay", "0.5", "--optim.betas", "[0.5, 0.6]", "--optim.eps", "0.01"]
    assert main(arguments(tiny_dataset, run, MORE, *new)) == 0
    decayed, kept = state_of(run)["optimizer_states"][0]["param_groups"]
    for group, weight_decay in ((decayed, 0.5), (kept, 0.0)):
        assert (group["weight_decay"], tuple(group["betas"]), group["eps"]) == (
            weight_decay,
            (0.5, 0.6),
            0.01,
        )
    again = tmp_path / "again"
    shutil.copytree(finished, again, symlinks=True)
    assert main(arguments(tiny_dataset, again, MORE)) == 0
    losses = [
        {line["step"]: line["train/loss"] for line in read_metrics(folder / "metrics.jsonl", "train")}
        for folder in (run, again)
    ]
    assert losses[0][STEPS + 1] == losses[1][STEPS + 1], "the first step is taken from the same weights"
    assert abs(losses[0][MORE] - losses[1][MORE]) > 1e-3


def test_embeddings_that_decay_in_an_older_checkpoint_are_refused_too(
    finished: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that says nothing of its settings: found when the state is read."""
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    newest = find_checkpoint(run)
    rewrite(newest.folder, settings="removed")
    capsys.readouterr()
    assert main(arguments(tiny_dataset, run, MORE, "--optim.decay_embeddings", "true")) == 2
    assert "optim.decay_embeddings false and this run asks for true" in capsys.readouterr().err


def test_a_changed_batch_is_counted_and_the_run_ends_at_its_tokens(
    finished: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    assert find_checkpoint(run).metadata["tokens"] == STEPS * 512
    shorter = arguments(tiny_dataset, run, MORE, "--train.tokens_per_batch", "1024")
    at = shorter.index("--train.max_steps")
    shorter[at : at + 2] = ["--train.max_tokens", str(STEPS * 512 + 2 * 1024)]
    assert main(shorter) == 0
    last = find_checkpoint(run)
    assert (last.step, last.metadata["tokens"]) == (STEPS + 2, STEPS * 512 + 2 * 1024)
    assert last.metadata["token_changes"] == [[0, 0], [STEPS, STEPS * 512]]
    lines = read_metrics(run / "metrics.jsonl", "train")
    assert [line["train/tokens"] for line in lines if line["step"] > STEPS] == [4096, 5120]


def checkpoint(step: int, **metadata: Any) -> Checkpoint:
    return Checkpoint(Path(f"step-{step}"), step, {"tokens": step * 512, **metadata})


def settings(**optim: Any) -> dict[str, Any]:
    config = PretrainConfig(
        train=TrainConfig(max_steps=100, tokens_per_batch=512),
        optim=OptimConfig(**{"lr": 1e-3, "warmup_steps": 10, **optim}),
    )
    return json.loads(json.dumps(dataclasses.asdict(config)))


@pytest.mark.parametrize(
    ("step", "schedule", "train", "optim", "words"),
    [
        (
            100,
            "cosine",
            {"max_steps": 200},
            {},
            ["from 0.0001 to 0.000587 at step 101", "100 and is 200", "wsd"],
        ),
        (100, "wsd", {"max_steps": 200}, {}, ["from 0.0001 to 0.001", "end of its schedule"]),
        (60, "cosine", {"max_steps": 200}, {}, ["at step 61", "train.max_steps was 100 and is 200"]),
        (60, "cosine", {"max_steps": 100}, {"lr": 2e-3}, ["optim.lr was 0.001 and is 0.002"]),
        (60, "wsd", {"max_steps": 200}, {}, None),
        (100, "constant", {"max_steps": 200}, {}, None),
        (60, "cosine", {"max_steps": 100}, {"weight_decay": 0.3}, None),
    ],
)
def test_a_learning_rate_that_jumps_is_told(
    step: int, schedule: str, train: dict[str, int], optim: dict[str, Any], words: list[str] | None
) -> None:
    saved = checkpoint(step, settings=settings(schedule=schedule))
    config = PretrainConfig(
        train=TrainConfig(tokens_per_batch=512, **train),
        optim=OptimConfig(**{"lr": 1e-3, "warmup_steps": 10, "schedule": schedule, **optim}),
    )
    note = learning_rate_note(saved, config, TokenCount.resumed(saved, 512))
    if words is None:
        assert note is None
    else:
        assert note is not None
        assert all(word in note for word in words), note


def test_only_losses_of_the_same_validation_set_are_compared() -> None:
    few, all_of_it = {"tokens": 512}, {"tokens": 4096}
    found = best_by_validation(
        [
            checkpoint(1, val_loss=2.0, validation=few),
            checkpoint(2, val_loss=3.0, validation=all_of_it),
            checkpoint(3, val_loss=2.5, validation=all_of_it),
            checkpoint(4, val_loss=2.5, validation=all_of_it),
            checkpoint(5, val_loss=None, validation=all_of_it),
            checkpoint(6, val_loss=9.0),
        ]
    )
    assert sorted(c.step for c in found.values()) == [1, 3, 6]


def test_best_follows_the_validation_set_of_the_run(
    finished: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    folder = run / "checkpoints"
    newest = find_checkpoint(run)
    # a loss that no later one beats, measured on other text
    rewrite(newest.folder, val_loss=0.1)
    more = ["--data.val_tokens", "256", "--checkpoint.keep_last", "1"]
    assert main(arguments(tiny_dataset, run, MORE, *more)) == 0
    assert (folder / "best").resolve().name == f"step-{MORE:08d}"
    assert newest.folder.is_dir(), "the best of the other text stays"


@pytest.mark.slow
def test_under_zero_settings_are_obeyed_as_in_one_process(tiny_dataset: Path, tmp_path: Path) -> None:
    """Every stage resumed with another optimizer, and with another arithmetic, in one process of its own."""
    new = ("--optim.weight_decay", "2.0", "--optim.betas", "[0.5, 0.6]", "--optim.eps", "0.1")
    bf16 = ("--train.precision", "bf16-mixed")
    lanes = {"plain": (), "zero-1": zero(1), "zero-3": zero(3)}
    first = [arguments(tiny_dataset, tmp_path / lane, STEPS, *GENTLE, *ways) for lane, ways in lanes.items()]
    copies = [
        (str(tmp_path / lane), str(tmp_path / f"{lane}-{name}")) for lane in lanes for name in ("new", "bf16")
    ]
    then = [
        arguments(tiny_dataset, tmp_path / f"{lane}-{name}", MORE, *GENTLE, *ways, *more)
        for lane, ways in lanes.items()
        for name, more in (("new", new), ("bf16", bf16))
    ]
    script = """
import json, shutil, sys
from dualroute.cli import main
first, copies, then = json.loads(sys.argv[1])
assert all(main(leg) == 0 for leg in first)
for source, target in copies:
    shutil.copytree(source, target, symlinks=True)
assert all(main(leg) == 0 for leg in then)
"""
    (tmp_path / "legs.py").write_text(script)
    legs = [json.dumps([first, copies, then])]
    result = warm.run(legs, cwd=ROOT, env=environment(), script=tmp_path / "legs.py", timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]

    def losses(name: str) -> list[float]:
        lines = read_metrics(tmp_path / name / "metrics.jsonl", "train")
        return [line["train/loss"] for line in lines if line["step"] > STEPS]

    reference = losses("plain-new")
    assert abs(reference[-1] - losses("plain-bf16")[-1]) > 0.02, "the new settings are seen in the losses"
    for lane in lanes:
        assert losses(f"{lane}-new") == pytest.approx(reference, abs=2e-4), lane
        assert losses(f"{lane}-bf16") == pytest.approx(losses("plain-bf16"), abs=0.01), lane


def zero(stage: int) -> tuple[str, ...]:
    return ("--parallel.strategy", "deepspeed", "--parallel.zero_stage", str(stage))


@pytest.mark.parametrize(
    ("before", "now", "wrote", "needed", "refused"),
    [
        ("32", "16-mixed", StateLayout(2, 1), StateLayout(2, 1), True),
        ("16-mixed", "bf16-mixed", StateLayout(2, 1), StateLayout(), True),
        ("32", "bf16-true", StateLayout(0, 1), StateLayout(0, 1), True),
        ("16-mixed", "16-mixed", StateLayout(2, 1), StateLayout(2, 1), False),
        ("32", "bf16-mixed", StateLayout(2, 1), StateLayout(2, 1), False),
        ("32", "16-mixed", StateLayout(), StateLayout(), False),
    ],
)
def test_arithmetic_that_a_state_cannot_follow_is_refused_with_both_values(
    before: str, now: str, wrote: StateLayout, needed: StateLayout, refused: bool
) -> None:
    saved = checkpoint(6, settings={"train": {"precision": before}})
    assert saved_precision(saved, "unknown") == before
    if not refused:
        refuse_other_precision(saved, wrote, needed, before, now)
        return
    with pytest.raises(UserError, match=f"train.precision {before} and this run asks for {now}"):
        refuse_other_precision(saved, wrote, needed, before, now)
