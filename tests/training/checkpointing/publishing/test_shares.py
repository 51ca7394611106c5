"""What each rank reads, writes and hashes for a checkpoint: its share and little more; and what it loads."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dualroute.model.checkpoint.format import (
    STATE,
    WEIGHTS,
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    verify_checkpoint,
)
from dualroute.training.checkpointing.divided_check import divided
from dualroute.training.checkpointing.state.layout import StateLayout
from dualroute.training.checkpointing.state.reader import KEYS, open_state
from tests import warm
from tests.conftest import ROOT
from tests.training.checkpointing.state.elastic_runs import SMALL, ZERO
from tests.training.step.test_module import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BF16 = ["--train.precision", "bf16-mixed"]
LATER = ["--checkpoint.asynchronous", "true"]
LANES = {
    "stage1": [*ZERO[1], *BF16],
    "stage2": [*ZERO[2], *BF16, *LATER],
    "stage3": [*ZERO[3], *LATER],
    "ddp": ["--parallel.strategy", "ddp"],
}
PARTITIONED = [lane for lane in LANES if lane != "ddp"]
#: ranks of each step's leg; the last one goes on with the layout that it finds
RANKS = {1: 2, 2: 4, 3: 2, 4: 2}
STARTS = [(2, [1]), (4, [2]), (2, [3, 4])]
SPARE = 160 * 1024  # bytes: a chunk, pickles, zip directories; partitions are megabytes


def leg(dataset, folder, lane, step):
    sizes = ["--model.dim", "128", "--model.num_layers", "2", "--train.max_steps", str(step)]
    own = ["--data.path", str(dataset), "--output", str(folder / lane), "--optim.warmup_steps", "0"]
    return [*SMALL, *sizes, *own, *LANES[lane]]


@pytest.fixture(scope="module")
def counted(tiny_dataset, tmp_path_factory):
    """(folder, {(lane, step): [counts of each rank]})"""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("shares")
    found = {}
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    script = str(ROOT / "tests" / "training" / "checkpointing" / "publishing" / "share_ranks.py")
    for ranks, steps in STARTS:
        cases = [(lane, step) for step in steps for lane in LANES]
        (folder / "legs.json").write_text(
            json.dumps([leg(tiny_dataset, folder, lane, step) for lane, step in cases])
        )
        text = warm.ranks(ranks, script, [str(folder / "legs.json")], cwd=ROOT, env=env)
        lines = [json.loads(line[8:]) for line in text.splitlines() if line.startswith("COUNTED ")]
        assert len(lines) == ranks
        found |= {case: [line[number] for line in lines] for number, case in enumerate(cases)}
    return folder, found


def checkpoints(counted, lane):
    return {c.step: c for c in list_checkpoints(counted[0] / lane / "checkpoints")}


def size_of(checkpoint, *names):
    files = checkpoint.metadata["files"]
    return sum(said["size"] for name, said in files.items() if not names or name.startswith(names))


@pytest.mark.parametrize("step", RANKS)
@pytest.mark.parametrize("lane", PARTITIONED)
def test_each_rank_writes_and_hashes_its_share(counted, lane, step):
    checkpoint, ranks = checkpoints(counted, lane)[step], counted[1][lane, step]
    verify_checkpoint(checkpoint)
    state = size_of(checkpoint, STATE)
    written = [rank["save"]["written"] for rank in ranks]
    share = (state + size_of(checkpoint, WEIGHTS)) / len(ranks)
    assert share > 4 * SPARE
    assert max(written) <= share + SPARE
    assert max(rank["save"]["hashed"] for rank in ranks) <= share + SPARE
    # nobody reads what was written, and together they have written it once
    assert max(rank["save"]["read"] for rank in ranks) <= SPARE
    assert abs(sum(written) - size_of(checkpoint, STATE, WEIGHTS)) <= SPARE


@pytest.mark.parametrize("step", [2, 3, 4])
@pytest.mark.parametrize("lane", PARTITIONED)
def test_each_rank_reads_and_hashes_its_share_at_a_resume(counted, lane, step):
    before, ranks = checkpoints(counted, lane)[step - 1], counted[1][lane, step]
    share = size_of(before) / len(ranks)
    assert sum(rank["resume"]["hashed"] for rank in ranks) == size_of(before)  # every byte, once
    assert max(rank["resume"]["hashed"] for rank in ranks) <= share + SPARE
    # hashed, then loaded; nothing is written
    loaded = size_of(before, STATE) / len(ranks)
    assert max(rank["resume"]["read"] for rank in ranks) <= share + loaded + 2 * SPARE
    assert max(rank["resume"]["written"] for rank in ranks) == 0


@pytest.mark.parametrize("step", [2, 3, 4])
@pytest.mark.parametrize("lane", PARTITIONED)
def test_what_is_loaded_is_what_was_saved_to_the_last_bit(counted, lane, step):
    before = checkpoints(counted, lane)[step - 1]
    loaded = counted[0] / f"{lane}-{step - 1}.loaded"
    layout = StateLayout(StateLayout.read(before).stage, RANKS[step])
    ours, theirs = open_state(Checkpoint(loaded, 0, {"state_layout": str(layout)})), open_state(before)
    assert ours.step == theirs.step == step - 1
    for name in theirs.shapes:
        for key in KEYS:
            assert torch.equal(ours.read(name, key), theirs.read(name, key)), (name, key)
    weights = [load_file(folder / WEIGHTS) for folder in (loaded, before.folder)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_weights_of_ddp_are_written_by_all_and_its_state_is_hashed_by_all(counted):
    """Its state is whole on every rank, so one of them writes it and each loads it."""
    for step, ranks in RANKS.items():
        counts = counted[1]["ddp", step]
        checkpoint = checkpoints(counted, "ddp")[step]
        verify_checkpoint(checkpoint)
        share, written = size_of(checkpoint, WEIGHTS) / ranks, [rank["save"]["written"] for rank in counts]
        assert all(abs(of_rank - share) <= SPARE < share for of_rank in written[1:])
        assert abs(written[0] - share - size_of(checkpoint, STATE)) <= SPARE
        if step > 1:
            before = checkpoints(counted, "ddp")[step - 1]
            assert sum(rank["resume"]["hashed"] for rank in counts) == size_of(before)


def test_partitions_of_stages_one_and_two_hold_no_weights_twice(counted):
    for lane in ("stage1", "stage2"):
        checkpoint = find_checkpoint(counted[0] / lane)
        states = next(checkpoint.state.rglob("mp_rank_00_model_states.pt"))
        assert states.stat().st_size < SPARE


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 1024])
def test_pieces_are_dealt_out_once_each(counted, ranks):
    for lane, step in (("stage3", 2), ("ddp", 1)):
        checkpoint = checkpoints(counted, lane)[step]
        dealt = [(piece.path, piece.start) for own in divided(checkpoint, ranks) for piece in own]
        assert len(dealt) == len(set(dealt))
        assert sum(p.size for own in divided(checkpoint, ranks) for p in own) == size_of(checkpoint)


def test_each_rank_compares_the_files_that_it_loads(counted):
    for rank, own in enumerate(divided(checkpoints(counted, "stage3")[2], 4)):
        names = {piece.path.name for piece in own if "_pp_rank_" in piece.path.name}
        assert {name.split("_pp_rank_")[1][0] for name in names} == {str(rank)}
