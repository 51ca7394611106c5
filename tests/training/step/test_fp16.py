"""fp16 under DeepSpeed: the loss scale adapts, a step that overflows is skipped, a resume keeps the scale."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from dualroute import compat
from tests.training.parallel.test_strategy import SPOILT, assert_same, launch, plain_torch
from tests.training.step.test_module import curve, train

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not compat.fp16_on_cpu(),
        reason="this processor has no fp16 arithmetic",
    ),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]
STAGES = (1, 2, 3)
TOLERANCE = 0.003
#: falls from where every gradient overflows, and rises after so many good steps
SCALE, WINDOW = 2.0**20, 4
FP16 = {"fp16": {"initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": WINDOW}}
STEPS, HALF = 20, 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Any]:
    folder = tmp_path_factory.mktemp("fp16")
    (folder / "ds.json").write_text(json.dumps(FP16))
    cases: dict[tuple[int, str], dict[str, Any]] = {}
    for stage in STAGES:
        fp16 = {"strategy": "deepspeed", "zero_stage": stage, "precision": "16-mixed"}
        cases[stage, "spoilt"] = SPOILT | fp16
        fp16 |= {"deepspeed_config": str(folder / "ds.json"), "accumulation": 2, "clip": 0.5}
        saved = str(folder / str(stage))
        cases[stage, "whole"] = fp16 | {"steps": STEPS}
        cases[stage, "first"] = fp16 | {"steps": HALF, "save": saved}
        cases[stage, "second"] = fp16 | {"steps": STEPS, "load": saved, "first_step": HALF}
    results = launch(2, folder, list(cases.values()))
    return dict(zip(cases, results, strict=True))


@pytest.mark.parametrize("stage", STAGES)
def test_it_stays_near_float32_and_skips_alike(runs: dict[tuple[int, str], Any], stage: int) -> None:
    assert_same(runs[stage, "spoilt"], plain_torch(**SPOILT), tolerance=TOLERANCE)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_overflows_is_skipped_and_the_scale_falls(
    runs: dict[tuple[int, str], Any], stage: int
) -> None:
    got = runs[stage, "whole"]
    skipped, scales = got["skipped"], got["scales"]
    first_good = skipped.index(False)
    assert first_good >= 2
    assert scales[: first_good + 1] == [SCALE / 2**step for step in range(first_good + 1)]
    assert any(after > before for before, after in itertools.pairwise(scales))  # it rises too
    for was_skipped, norm, (before, after) in zip(
        skipped, got["norms"], itertools.pairwise(scales), strict=False
    ):
        assert math.isinf(norm) == was_skipped
        assert (after == before / 2) if was_skipped else (after in (before, 2 * before))
    # what was trained is a run that passes over the same steps; a skipped one moves nothing
    truth = plain_torch(
        steps=STEPS, accumulation=2, clip=0.5, skip=[step for step, bad in enumerate(skipped) if bad]
    )
    assert got["losses"] == pytest.approx(truth["losses"], abs=TOLERANCE)
    assert got["engine_steps"] == got["global_step"] == STEPS


@pytest.mark.parametrize("stage", STAGES)
def test_a_resume_keeps_the_scale(runs: dict[tuple[int, str], Any], stage: int) -> None:
    first, second, whole = (runs[stage, name] for name in ("first", "second", "whole"))
    assert first["scales"][-1] != SCALE
    for key in ("scales", "skipped", "rates", "losses"):
        assert first[key] + second[key] == whole[key], key


def test_the_model_itself_trains_in_fp16(tiny_dataset: Path, tmp_path: Path) -> None:
    zero = ("--parallel.strategy", "deepspeed", "--parallel.zero_stage", "2")
    more = ("--optim.lr", "0.003", "--monitor.sample_every_steps", "0")
    train(tiny_dataset, tmp_path / "32", 9, *more)
    train(tiny_dataset, tmp_path / "16", 9, *more, *zero, "--train.precision", "16-mixed")
    for event in ("train", "validation"):
        ours, theirs = curve(tmp_path / "16", event), curve(tmp_path / "32", event)
        assert ours.keys() == theirs.keys()
        assert ours != theirs
        assert max(abs(ours[step] - theirs[step]) for step in ours) < 1e-3
