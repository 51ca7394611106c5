"""No code in a checkpoint is run, whoever reads it: not by a resume, and not by DeepSpeed's own readers."""

import re

import pytest
import torch

from dualroute.errors import UserError
from dualroute.training.checkpointing.state.file import StateFile
from dualroute.training.checkpointing.state.safe_load import deepspeed_loads_safely, load_file
from tests import warm
from tests.conftest import ROOT
from tests.training.checkpointing.hostile_resume import Payload
from tests.training.step.test_module import environment


@pytest.mark.parametrize("what", ["payload", "folder", "missing", "empty", "text", "truncated"])
def test_a_state_that_is_none_is_one_line(tmp_path, what):
    path, marker = tmp_path / "state.ckpt", tmp_path / "ran"
    whole = {"state_dict": {}, "optimizer_states": [], "loops": {}, "global_step": 1, "callbacks": {}}
    if what == "folder":
        path.mkdir()
    elif what in ("empty", "text"):
        path.write_text("" if what == "empty" else "no state at all")
    elif what != "missing":
        torch.save({**whole, "loops": Payload(marker)} if what == "payload" else whole, path)
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=re.escape(str(path))) as refusal:
        StateFile().load_checkpoint(path)
    assert "use another checkpoint" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not marker.exists()
    if what == "payload":
        assert "mkdir" in str(refusal.value)


def test_every_load_of_deepspeed_is_a_safe_one(tmp_path):
    pytest.importorskip("deepspeed")
    path, marker, original = tmp_path / "states.pt", tmp_path / "ran", torch.load
    torch.save({"a": Payload(marker)}, path)
    with pytest.raises(UserError, match="code in a checkpoint is not"), deepspeed_loads_safely():
        torch.load(path, map_location="cpu", weights_only=False)
    assert torch.load is original
    assert not marker.exists()
    torch.save({"a": torch.ones(2)}, path)
    with deepspeed_loads_safely():
        assert torch.load(str(path), weights_only=False)["a"].sum() == 2
    assert load_file(path)["a"].sum() == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_resume_runs_no_code_of_any_file_that_it_reads(tiny_dataset, tmp_path):
    pytest.importorskip("deepspeed")
    words, script = [tiny_dataset, tmp_path], "tests/training/checkpointing/hostile_resume.py"
    result = warm.run(words, cwd=ROOT, env=environment(), script=script, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "whole states are resumed" in result.stdout
    assert not list(tmp_path.glob("run-by-*"))
    attempts = re.findall(r"^([\w-]+) (\S+): status (\d), (.*)$", result.stdout, re.M)
    assert len(attempts) == 1 + 1 + 2 + 2 + 2 * (3 + 2)
    for _, file, status, line in attempts:
        if status != "0":
            assert file in line
            assert "which is neither a tensor nor a plain value" in line
    # of an index, which serves both stages, some files are read at one of them only
    passed = [(layout, file) for layout, file, status, _ in attempts if status == "0"]
    assert len(passed) <= 3
    assert all("-to-" in layout for layout, _ in passed)
