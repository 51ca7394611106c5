"""Single tensors of a safetensors file, and files that are none."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dualroute.errors import UserError
from dualroute.model.checkpoint.weights_file import TensorFile, write_tensors

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(4, 3),
    "b.weight": torch.arange(6).to(torch.bfloat16).view(2, 3),
    "codes": torch.arange(5, dtype=torch.uint8),
    "one": torch.tensor(7.0),
    "none": torch.empty(0, 3),
}


def test_tensors_and_rows_are_those_of_the_library(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    file, theirs = TensorFile(path), load_file(path)
    assert file.layout == {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}
    ours = dict(file.tensors())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name])
    assert torch.equal(file.read("a", rows=(1, 3)), TENSORS["a"][1:3])
    assert file.read("a", rows=(4, 4)).shape == (0, 3)


def header(path, **changes):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    text = json.dumps({"w": entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [3]},
        {"shape": [-2]},
        {"shape": "2"},
        {"data_offsets": [8, 16]},
        {"data_offsets": [0]},
        {"dtype": "F7"},
        {"dtype": []},
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path, changes):
    path = tmp_path / "x.safetensors"
    header(path)
    assert TensorFile(path).read("w").tolist() == [0, 0]
    header(path, **changes)
    with pytest.raises(UserError, match=r"x\.safetensors cannot be read"):
        TensorFile(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, (4).to_bytes(8, "little") + b"[{]]"])
def test_what_is_no_such_file_is_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors cannot be read"):
        TensorFile(path)


def test_a_file_that_was_cut_short_meanwhile_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError, match="it ends inside a"):
        file.read("a")
