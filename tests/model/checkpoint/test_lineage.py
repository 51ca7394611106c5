"""The history that checkpoints carry: nothing on the way to a model forgets the trainings before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dualroute.cli import main
from dualroute.model.checkpoint.format import Checkpoint, find_checkpoint
from dualroute.model.checkpoint.lineage import (
    continued,
    derived,
    history,
    imported,
    operation_of,
    total_tokens,
)
from tests.training.step.test_module import SMALL


def checkpoint(name: str, **metadata: Any) -> Checkpoint:
    return Checkpoint(Path(name), int(metadata.get("step", 0)), metadata)


def run(name: str, tokens: int, **more: Any) -> Checkpoint:
    return checkpoint(
        f"{name}/checkpoints/step-00000010", step=10, tokens=tokens, operation="pretrain", **more
    )


def test_tokens_add_up_over_trainings_and_only_over_trainings() -> None:
    parent = run("base", 1000, data_fingerprint="f" * 40)
    pruned = checkpoint("small", **derived(parent, "prune"))
    assert (pruned.metadata["tokens"], pruned.metadata["total_tokens"]) == (1000, 1000)
    recovered = checkpoint(
        "again/checkpoints/step-00000004", step=4, tokens=50, operation="distill", lineage=continued(pruned),
        teacher={"folder": "base/step-00000010", "tokens": 1000},
    )  # fmt: skip
    assert total_tokens(recovered.metadata) == 1050
    quantized = checkpoint("int8", **derived(recovered, "quantize"))
    assert total_tokens(quantized.metadata) == 1050
    assert list(history(quantized)) == [
        "pretrain: base/step-00000010 (1,000 tokens in 10 steps; data ffffffffffff)",
        "prune: small",
        "distill: again/step-00000004 (50 tokens in 4 steps; teacher base/step-00000010, 1,000 tokens)",
        "quantize: int8",
    ]


def test_checkpoints_from_before_say_what_they_can() -> None:
    for metadata, operation in (
        ({"tokens": 7, "state_layout": "one file"}, "pretrain"),
        ({"tokens": 7, "quantization": {}}, "quantize"),
        ({"tokens": 0, "pruned_from": "x"}, "prune"),
        ({"conversion": {}}, "convert"),
    ):
        assert operation_of(metadata) == operation
        old = checkpoint("old", **metadata)
        assert total_tokens(old.metadata) == metadata.get("tokens", 0)
        assert total_tokens(derived(old, "sparsify")) == metadata.get("tokens", 0)


@pytest.mark.parametrize("lineage", [None, 7, "x", [1], {"a": 1}, [{"operation": 3, "tokens": "many"}]])
def test_a_damaged_lineage_does_not_stop_who_reads_it(lineage: Any) -> None:
    damaged = checkpoint("x", operation="pretrain", tokens=5, lineage=lineage)
    assert total_tokens(damaged.metadata) == 5
    assert list(history(damaged))[-1].startswith("pretrain: x")


def test_a_model_from_elsewhere_says_so() -> None:
    converted = checkpoint("dual", **imported("SmolLM"))
    assert list(history(converted)) == ["elsewhere: SmolLM", "convert: dual"]
    assert total_tokens(converted.metadata) == 0


@pytest.mark.slow
def test_the_commands_hand_the_history_on(tiny_dataset: Path, tmp_path: Path) -> None:
    """pretrain → prune → pretrain --init_from → quantize; a distilled one names its teacher."""
    data = ["--data.path", str(tiny_dataset)]
    pairs = zip(SMALL[::2], SMALL[1::2], strict=True)
    shapeless = [word for flag, value in pairs if not flag.startswith("--model.") for word in (flag, value)]
    base, small, tuned, int8, student = (
        tmp_path / name for name in ("base", "small", "tuned", "int8", "student")
    )

    def do(*arguments: object) -> None:
        assert main([str(argument) for argument in arguments]) == 0

    steps = ["--train.max_steps", 6]
    do("pretrain", *SMALL, *data, "--output", base, *steps)
    do(
        *("prune", "--checkpoint", base, "--output", small, "--data", tiny_dataset, "--ffn_dim", 64),
        *("--multiple", 32, "--calibration_tokens", 512),
    )
    do("pretrain", *shapeless, *data, "--output", tuned, "--init_from", small, *steps)
    do("quantize", "--checkpoint", tuned, "--output", int8, "--device", "cpu")
    do("distill", *shapeless, *data, "--output", student, "--init_from", small, "--teacher", base, *steps)
    read = 6 * 512
    made = find_checkpoint(int8)
    lines = list(history(made))
    assert [line.split(":")[0] for line in lines] == ["pretrain", "prune", "pretrain", "quantize"]
    assert (
        f"{read:,} tokens in 6 steps; data {find_checkpoint(base).metadata['data_fingerprint'][:12]}"
        in lines[0]
    )
    assert made.metadata["total_tokens"] == made.metadata["tokens"] == 2 * read
    run_of = find_checkpoint(tuned).metadata
    assert (run_of["tokens"], run_of["total_tokens"]) == (read, 2 * read)
    teacher = find_checkpoint(student).metadata["teacher"]
    assert teacher["tokens"] == read
    assert teacher["weights_sha256"] == find_checkpoint(base).metadata["files"]["model.safetensors"]["sha256"]
    # a resume carries it on, although what the run began with is gone
    small.rename(tmp_path / "away")
    assert find_checkpoint(tuned).metadata["lineage"] == continued(
        Checkpoint(small, 0, find_checkpoint(tmp_path / "away").metadata)
    )
