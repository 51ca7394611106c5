"""A student that learns with adapters: its teacher's word, hidden states and heads; killed and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dualroute.cli import main
from dualroute.model.checkpoint.format import find_checkpoint, load_model
from tests.training.checkpointing.runs import killed_in, pretrain
from tests.training.step.test_module import SMALL, curve


def distil(dataset: Path, teacher: Path, student: Path, output: Path) -> int:
    words = ["distill", *SMALL, "--data.path", str(dataset), "--teacher", str(teacher)]
    words += ["--init_from", str(student), "--output", str(output), "--train.max_steps", "8"]
    words += ["--distill.hidden_weight", "1", "--distill.attention_weight", "1"]
    words += ["--finetune.adapter", "dora", "--finetune.rank", "4", "--finetune.dropout", "0.1"]
    return main([*words, "--monitor.sample_every_steps", "0"])


@pytest.mark.slow
def test_a_student_with_adapters_learns_and_resumes_exactly(tiny_dataset: Path, tmp_path: Path) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    assert pretrain(tiny_dataset, teacher, 9, "--seed", "3") == 0
    assert pretrain(tiny_dataset, student, 5) == 0
    assert distil(tiny_dataset, teacher, student, tmp_path / "whole") == 0
    with killed_in(7):
        distil(tiny_dataset, teacher, student, tmp_path / "run")
    assert find_checkpoint(tmp_path / "run").step == 4
    assert distil(tiny_dataset, teacher, student, tmp_path / "run") == 0
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    found = find_checkpoint(tmp_path / "run")
    ours, theirs = (
        load_model(found).state_dict(),
        load_model(find_checkpoint(tmp_path / "whole")).state_dict(),
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    before = load_model(find_checkpoint(student)).state_dict()
    moved = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert moved == {name for name in ours if "layers." in name and "norm" not in name}
    assert (found.folder / "adapter" / "adapter_model.safetensors").is_file()
