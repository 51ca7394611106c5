"""``dualroute checkpoint verify`` calls nothing good that it could not compare."""

import json

import pytest

from dualroute.cli import main
from dualroute.data.manifest import Manifest
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint_format import METADATA, WEIGHTS, load_model, read_checkpoint, save_model


@pytest.fixture
def checkpoint(tiny_dataset, tmp_path):
    config = ModelConfig(vocab_size=320, dim=32, num_layers=1, num_heads=4, window=8, block=16).resolved()
    tokenizer = Manifest.load(tiny_dataset).tokenizer_path
    return save_model(DualRoutingTransformer(config), tmp_path / "step-00000001", tokenizer, {"step": 1})


def rewrite(checkpoint, **changes):
    path = checkpoint.folder / METADATA
    metadata = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in metadata.items() if value != "removed"}))


def test_what_is_described_and_the_same_is_good(checkpoint, capsys):
    assert main(["checkpoint", "verify", str(checkpoint.folder)]) == 0
    assert capsys.readouterr().out == f"good: {checkpoint.folder} (3 files)\n"


@pytest.mark.parametrize("files", ["removed", {}])
def test_without_a_list_of_files_nothing_is_good(checkpoint, capsys, files):
    rewrite(checkpoint, files=files)
    assert main(["checkpoint", "verify", str(checkpoint.folder)]) == 1
    out = capsys.readouterr().out
    assert "good" not in out
    assert out.count("damaged: ") == 3
    assert f"{checkpoint.folder / METADATA} says nothing of {WEIGHTS}" in out
    with pytest.raises(UserError, match="says nothing of"):
        load_model(read_checkpoint(checkpoint.folder))


@pytest.mark.parametrize(("layout", "found"), [("one file", 1), (None, 0)])
def test_a_state_that_is_spoken_of_must_be_described(checkpoint, capsys, layout, found):
    rewrite(checkpoint, state_layout=layout)
    assert main(["checkpoint", "verify", str(checkpoint.folder)]) == found
    assert ("says nothing of state.ckpt" in capsys.readouterr().out) == bool(found)
