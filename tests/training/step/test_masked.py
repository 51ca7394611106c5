"""An encoder learns masked tokens through the same command, and goes on as if it had not been stopped."""

import math

import pytest

from dualroute.cli import main
from dualroute.model.checkpoint.format import find_checkpoint, load_model
from dualroute.training.monitoring.metrics_log import read_metrics
from tests.training.step.test_module import command, curve, train

MASKED = ("--model.causal", "false", "--data.objective", "masked")


@pytest.mark.slow
def test_the_masked_loss_falls_and_a_resumed_run_is_the_unbroken_one(tiny_dataset, tmp_path, capsys):
    train(tiny_dataset, tmp_path / "unbroken", 24, *MASKED)
    whole = curve(tmp_path / "unbroken")
    validation = curve(tmp_path / "unbroken", "validation")
    assert abs(validation[0] - math.log(320)) < 0.3
    assert validation[24] < validation[0] - 1.5
    (first, *_) = read_metrics(tmp_path / "unbroken" / "metrics.jsonl", "validation")
    assert "val/bits_per_byte" not in first  # of a part of the text
    assert load_model(find_checkpoint(tmp_path / "unbroken")).config.causal is False

    stop = ("--optim.schedule", "constant")
    for name, parts in (("one", (12,)), ("two", (8, 12))):
        for steps in parts:  # another division of the batch, and masks by the loaders' processes
            more = ("--data.num_workers", "1") if steps == 8 else ()
            train(tiny_dataset, tmp_path / name, steps, *MASKED, *stop, *more)
    assert curve(tmp_path / "one") == curve(tmp_path / "two")
    assert whole[1] == curve(tmp_path / "one")[1]

    again = command(tiny_dataset, tmp_path / "one", 14, *stop)[3:]
    assert main(again) == 2
    assert "data.objective" in capsys.readouterr().err
    assert main(["generate", "--checkpoint", str(tmp_path / "one"), "--prompt", "a"]) == 2
    assert "model.causal false" in capsys.readouterr().err
    assert main(["evaluate", "--checkpoint", str(tmp_path / "one"), "--data", str(tiny_dataset)]) == 0
    assert "masked" in capsys.readouterr().out
    assert main(["report", "--run", str(tmp_path / "one")]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model.causal", "false"), "data.objective next_token cannot be trained with model.causal false"),
        (("--data.objective", "masked"), "data.objective masked cannot be trained with model.causal true"),
        ((*MASKED, "--data.mask_share", "0"), "data.mask_share"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(more, message, tiny_dataset, tmp_path, capsys):
    assert main(command(tiny_dataset, tmp_path / "run", 4, *more)[3:]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
