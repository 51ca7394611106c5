"""A teacher whose layers are divided among ranks: by itself, and at work beside every kind of student."""

import json
import re

import pytest
import torch

from dualroute.distillation.teacher import Teacher
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig
from tests import warm
from tests.conftest import ROOT
from tests.distillation.test_run import EVERYTHING, FEW, Plain, arguments, close, distil, figures, teacher
from tests.training.step.test_module import curve, environment

__all__ = ["distil", "teacher"]  # fixtures

SHARDED = ("--distill.teacher_sharded", "true")
STUDENTS = {
    "ddp": "--parallel.strategy ddp",
    "zero3": "--parallel.strategy deepspeed --parallel.zero_stage 3",
    "shared_texts": "--parallel.strategy deepspeed --parallel.zero_stage 1 --parallel.sequence_parallel 2",
}
HALF = 3
#: a student of the teacher's shape, for heads are compared too; some texts are its own
INSIDE = (
    *"--model.dim 32 --model.num_layers 2 --optim.lr 0.003 --optim.warmup_steps 2".split(),
    *"--distill.hidden_weight 0.1 --distill.attention_weight 0.1".split(),
    *EVERYTHING[-6:],
)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.nightly), 4])
def test_each_rank_holds_its_share_and_says_what_a_whole_teacher_says(ranks, tmp_path):
    warm.ranks(ranks, "tests/distillation/teacher_ranks.py", [str(tmp_path)], cwd=ROOT, env=environment())


@pytest.mark.slow
def test_one_process_keeps_it_whole(distil):
    whole, kept = distil(steps=FEW), distil(*SHARDED, "--distill.teacher_offload", "true", steps=FEW)
    assert curve(kept) == curve(whole)
    made = Teacher(
        DualRoutingTransformer(ModelConfig(vocab_size=50, dim=16, num_layers=1, num_heads=2)), sharded=True
    )
    made.shard()
    assert all(type(p) is torch.nn.Parameter for p in made.model.parameters())


def test_a_teacher_without_layers_is_refused():
    with pytest.raises(UserError, match=r"teacher_sharded divides layers, and this teacher has no list"):
        Teacher(Plain(), sharded=True)


@pytest.fixture(scope="module")
def two_ranks(tiny_dataset, teacher, tmp_path_factory):
    """By student: the run with a whole teacher, that with a divided one, which stopped and went on."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("two ranks")
    runs = {name: (folder / name / "whole", folder / name / "divided") for name in STUDENTS}
    legs = []
    for name, parallel in STUDENTS.items():
        whole, divided = runs[name]
        for output, more, steps in (
            (whole, (), FEW),
            (divided, SHARDED, HALF),
            (divided, (*SHARDED, "--resume", divided / "checkpoints" / f"step-{HALF:08d}"), FEW),
        ):
            settings = (*INSIDE, *parallel.split(), *more)
            legs.append(arguments(tiny_dataset, teacher, output, *settings, steps=steps)[1:])
    (folder / "runs.json").write_text(json.dumps(legs))
    words = [str(folder / "runs.json")]
    printed = warm.ranks(2, "tests/distillation/distil_runs.py", words, cwd=ROOT, env=environment())
    return runs, printed


@pytest.mark.slow
@pytest.mark.parametrize("student", STUDENTS)
def test_students_learn_the_same_from_it_and_resume(two_ranks, student):
    whole, divided = two_ranks[0][student]
    assert curve(divided).keys() == curve(whole).keys() == set(range(1, FEW + 1))
    assert close(curve(divided), curve(whole)) <= 1e-6
    for name in ("divergence", "hidden_loss", "attention_loss"):
        theirs = figures(whole, f"train/{name}")
        assert figures(divided, f"train/{name}") == pytest.approx(theirs, abs=1e-6)
    for name in ("loss", "divergence"):
        first, *_, last = figures(divided, f"val/{name}", "validation")
        assert [first, last] == pytest.approx(figures(whole, f"val/{name}", "validation"), abs=1e-6)


@pytest.mark.slow
def test_it_is_divided_in_these_runs_and_only_there(two_ranks):
    told = re.findall(r"rank (\d) of run (\d+): (\d+) -> (\d+) bytes", two_ranks[1])
    assert len(told) == 2 * 3 * len(STUDENTS)
    whole = {int(after) for _, number, _, after in told if int(number) % 3 == 0}
    assert len(whole) == 1
    for _, number, before, after in told:
        if int(number) % 3 == 0:
            assert before == after
        else:
            assert int(before) == 0  # its layers are read when they are divided
            assert 0.5 <= int(after) / max(whole) < 0.51
