"""``dualroute checkpoint``: what it prints, its exit status, and what it writes."""

import re
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualroute.cli import main
from dualroute.errors import UserError
from dualroute.model.checkpoint_format import find_checkpoint, list_checkpoints, load_model
from dualroute.training.checkpointing import commands
from dualroute.training.checkpointing.resume import refuse_damaged
from dualroute.training.checkpointing.state_reader import WEIGHT, PartitionedState, open_state
from tests.sealed import redescribe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def run(elastic, tmp_path):
    """A copy of a run at stage 3 that may be damaged."""
    return shutil.copytree(elastic.folder / "stage3", tmp_path / "run", symlinks=True)


def shard(checkpoint, rank):
    return checkpoint.state / "checkpoint" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def test_list_shows_every_checkpoint_and_what_points_to_it(run, capsys):
    (run / "checkpoints" / ".writing-step-00000099").mkdir()
    assert main(["checkpoint", "list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == [
        c.folder.name for c in list_checkpoints(run / "checkpoints")
    ]
    assert "ZeRO-3 partitions of 4 rank(s)" in lines[3]
    assert lines[4].endswith("← best  ← last")
    assert lines[5].startswith("unfinished: .writing-step-00000099")


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_verify_names_the_damaged_file_and_fails(run, capsys, damage):
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count("good: ") == 4
    first, second = list_checkpoints(run / "checkpoints")[1:3]
    path = shard(second, 1)
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    assert main(["checkpoint", "verify", str(run)]) == 1
    printed = capsys.readouterr().out
    assert re.findall(r"damaged: (\S+)", printed) == [str(path)]
    assert printed.count("good: ") == 3
    assert main(["checkpoint", "verify", str(first.folder)]) == 0
    assert main(["checkpoint", "verify", str(second.folder)]) == 1
    # a resume refuses it too, and names the newest one before it that is whole
    with pytest.raises(UserError, match=re.escape(f"{path} ")) as refusal:
        refuse_damaged(second, digests=True, together=False)
    assert str(refusal.value).endswith(f"--resume {first.folder}")


@pytest.mark.parametrize(("lane", "leg"), [("stage1", 0), ("stage2", 2), ("stage3", 2), ("mixed", 1)])
def test_an_export_is_the_model(elastic, tmp_path, lane, leg, capsys):
    checkpoint = list_checkpoints(elastic.folder / lane / "checkpoints")[leg]
    output = tmp_path / "exported"
    assert main(["checkpoint", "export", str(checkpoint.folder), "--output", str(output)]) == 0
    assert "read back and equal" in capsys.readouterr().out
    ours, theirs = load_model(find_checkpoint(output)).eval(), load_model(checkpoint).eval()
    ids = torch.arange(20).view(1, 20)
    assert torch.equal(ours(ids), theirs(ids))
    assert {p.name for p in output.iterdir()} == {
        "model.safetensors", "model.json", "tokenizer.model", "checkpoint.json",
    }  # fmt: skip
    # it holds no training state, and a resume says so
    with pytest.raises(UserError, match="weights without a training state"):
        open_state(find_checkpoint(output))
    # nothing is written over
    assert main(["checkpoint", "export", str(checkpoint.folder), "--output", str(output)]) == 2


def test_an_export_may_be_rounded(elastic, tmp_path):
    source = find_checkpoint(elastic.folder / "stage2")
    commands.export(str(source.folder), str(tmp_path / "exported"), "bfloat16")
    written, state = load_file(tmp_path / "exported" / "model.safetensors"), open_state(source)
    for name, tensor in state.tensors(WEIGHT):
        assert torch.equal(written[name.removeprefix("model.")], tensor.bfloat16())


def test_an_export_that_does_not_compare_equal_is_not_left(run, tmp_path):
    """Weights in the checkpoint that are not the optimizer's: whole by their sha256, and wrong."""
    checkpoint = find_checkpoint(run)
    path = checkpoint.folder / "model.safetensors"
    weights = load_file(path)
    weights["norm.weight"][3] += 1e-3
    save_file(weights, path)
    redescribe(checkpoint.folder, "model.safetensors")
    with pytest.raises(UserError, match=r"norm\.weight is not the weight"):
        commands.export(str(run), str(tmp_path / "exported"))
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_an_export_reads_a_parameter_when_the_one_before_the_last_is_gone(elastic, tmp_path, monkeypatch):
    read, seen, alive = PartitionedState.read, [], []

    def counted(self, name, key):
        alive.append(sum(reference() is not None for reference in seen))
        tensor = read(self, name, key)
        seen.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(PartitionedState, "read", counted)
    commands.export(str(elastic.folder / "stage3"), str(tmp_path / "exported"))
    parameters = len(open_state(find_checkpoint(elastic.folder / "stage3")).shapes)
    assert len(seen) == 2 * parameters  # once to write, once to compare
    assert max(alive) <= 1


def test_convert_writes_what_deepspeed_calls_universal(elastic, tmp_path, capsys):
    output = tmp_path / "universal"
    assert main(["checkpoint", "convert", str(elastic.folder / "mixed"), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "parameters converted" in printed
    assert "one file" in printed  # its last leg was DDP
    state = open_state(find_checkpoint(elastic.folder / "mixed"))
    zero = output / (output / "latest_universal").read_text() / "zero"
    assert {p.name for p in zero.iterdir()} == {*state.shapes, "optimizer_state.pt"}
    for name, tensor in state.tensors(WEIGHT):
        assert torch.equal(torch.load(zero / name / "fp32.pt")["param"], tensor)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["frobnicate", "x"], "invalid choice"),
        (["list", "{tmp}"], "no finished checkpoint"),
        (["verify", "{tmp}/none"], "no finished checkpoint"),
        (["export", "{tmp}", "--output", "{tmp}/x"], "no finished checkpoint"),
        (["export", "{tmp}"], "output"),
    ],
)
def test_wrong_use_is_one_line(tmp_path, capsys, arguments, line):
    assert main(["checkpoint", *(word.format(tmp=tmp_path) for word in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert line in error
    assert len(error.splitlines()) == 1
