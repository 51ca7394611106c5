"""Muon on several ranks, at each ZeRO stage and over resumes with others: one run in the end."""

import pytest

from dualroute.model.checkpoint.format import find_checkpoint, list_checkpoints
from dualroute.training.checkpointing.state.layout import StateLayout
from dualroute.training.checkpointing.state.reader import open_state
from tests.training.checkpointing.state.elastic_runs import ZERO, launch, leg
from tests.training.step.test_module import curve

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first test waits for all trainings

RANKS = (2, 1, 2)
STEPS = 3 * len(RANKS)
MUON = ["--optim.name", "muon", "--optim.muon.lr", "0.005", "--optim.grad_clip", "0.5"]
MUON += ["--model.num_kv_heads", "2"]  # so that two ranks share a matrix at stages 1 and 2
LANES = {
    "stage2": [ZERO[2]] * 3,
    "stage3": [ZERO[3]] * 3,
    "mixed": [ZERO[3], [], ZERO[1]],
    "whole": [["--parallel.strategy", "ddp"], [], ZERO[0]],
}
LAYOUTS = {
    "stage2": [(2, 2), (2, 1), (2, 2)],
    "stage3": [(3, 2), (3, 1), (3, 2)],
    "mixed": [(3, 2), None, (1, 2)],
    "whole": [None, None, (0, 2)],
}


@pytest.fixture(scope="module")
def runs(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("muon")
    legs = [
        [
            leg(tiny_dataset, folder / lane, number, [*MUON, *arguments[number]])
            for lane, arguments in LANES.items()
        ]
        for number in range(len(RANKS))
    ]
    legs[1].append(leg(tiny_dataset, folder / "unbroken", len(RANKS) - 1, MUON))
    for ranks, of_number in zip(RANKS, legs, strict=True):
        launch(folder, ranks, of_number)
    return folder


@pytest.mark.parametrize("lane", LANES)
def test_two_one_two_ranks_are_one_run(runs, lane):
    ours, whole = curve(runs / lane), curve(runs / "unbroken")
    assert sorted(ours) == list(range(1, STEPS + 1))
    assert whole[1] - whole[STEPS] > 0.1, "the rates are such that a run learns"
    assert max(abs(ours[step] - whole[step]) for step in whole) <= 1e-5
    layouts = [StateLayout.read(checkpoint) for checkpoint in list_checkpoints(runs / lane / "checkpoints")]
    assert layouts == [StateLayout(*layout) if layout else StateLayout() for layout in LAYOUTS[lane]]


@pytest.mark.parametrize("lane", LANES)
def test_weights_and_means_went_on_as_well(runs, lane):
    ours, whole = (open_state(find_checkpoint(runs / name)) for name in (lane, "unbroken"))
    assert float(ours.step) == float(whole.step) == STEPS
    assert [group["kind"] for group in ours.hyperparameters] == ["rest", "embedding", "muon"]
    assert ours.groups == whole.groups
    for name in whole.shapes:
        assert ours.keys_of(name) == whole.keys_of(name)
        assert ("exp_avg_sq" in whole.keys_of(name)) == (name not in ours.groups[2])
        for key in whole.keys_of(name):
            theirs = whole.read(name, key)
            assert (ours.read(name, key) - theirs).abs().max() <= 1e-3 * theirs.abs().max() + 1e-7, (
                name,
                key,
            )
