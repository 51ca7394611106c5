"""``dualroute checkpoint verify`` calls nothing good that it could not compare."""

import json
import subprocess
import sys

import pytest

from dualroute.cli import main
from dualroute.data.manifest import Manifest
from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.folder import SEAL
from dualroute.model.checkpoint.format import METADATA, WEIGHTS, load_model, read_checkpoint, save_model
from tests.sealed import rewrite


@pytest.fixture
def checkpoint(tiny_dataset, tmp_path):
    config = ModelConfig(vocab_size=320, dim=32, num_layers=1, num_heads=4, window=8, block=16).resolved()
    tokenizer = Manifest.load(tiny_dataset).tokenizer_path
    return save_model(DualRoutingTransformer(config), tmp_path / "step-00000001", tokenizer, {"step": 1})


def test_what_is_described_and_the_same_is_good(checkpoint, capsys):
    assert main(["checkpoint", "verify", str(checkpoint.folder)]) == 0
    assert capsys.readouterr().out == f"good: {checkpoint.folder} (3 files)\n"


@pytest.mark.parametrize("files", ["removed", {}])
def test_without_a_list_of_files_nothing_is_good(checkpoint, capsys, files):
    rewrite(checkpoint.folder, files=files)
    assert main(["checkpoint", "verify", str(checkpoint.folder)]) == 1
    out = capsys.readouterr().out
    assert "good" not in out
    assert out.count("damaged: ") == 3
    assert f"{checkpoint.folder / METADATA} says nothing of {WEIGHTS}" in out
    with pytest.raises(UserError, match="says nothing of"):
        load_model(read_checkpoint(checkpoint.folder))


@pytest.mark.parametrize(("layout", "found"), [("one file", 1), (None, 0)])
def test_a_state_that_is_spoken_of_must_be_described(checkpoint, capsys, layout, found):
    rewrite(checkpoint.folder, state_layout=layout)
    assert main(["checkpoint", "verify", str(checkpoint.folder)]) == found
    assert ("says nothing of state.ckpt" in capsys.readouterr().out) == bool(found)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"step": 1', '"step": 2'),
        ('"tokens": 0', '"tokens": 7'),
        ("}", ""),
        ('"sha256": "', '"sha256": "0'),
    ],
    ids=["step", "tokens", "cut", "hash"],
)
def test_damage_to_the_metadata_themselves_is_seen_and_named(checkpoint, capsys, old, new):
    path = checkpoint.folder / METADATA
    path.write_text(path.read_text().replace(old, new, 1))
    assert main(["checkpoint", "verify", str(checkpoint.folder)]) == 1
    assert capsys.readouterr().out.startswith(f"damaged: {path} is damaged (")
    with pytest.raises(UserError, match=METADATA):
        read_checkpoint(checkpoint.folder)


def test_laid_out_otherwise_they_are_the_same_and_one_of_an_earlier_version_is_good(checkpoint):
    path = checkpoint.folder / METADATA
    said = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(said.items()))))
    assert read_checkpoint(checkpoint.folder).metadata == said
    path.write_text(json.dumps({key: value for key, value in said.items() if key != SEAL} | {"tokens": 7}))
    assert read_checkpoint(checkpoint.folder).metadata["tokens"] == 7
    assert load_model(read_checkpoint(checkpoint.folder)).config.dim == 32


def test_looking_at_checkpoints_needs_no_torch(checkpoint):
    script = (
        "import sys; from dualroute.__main__ import main; status = main(); "
        "sys.exit(9 if 'torch' in sys.modules else status)"
    )
    for words in (["verify", str(checkpoint.folder)], ["list", str(checkpoint.folder.parent)]):
        done = subprocess.run(
            [sys.executable, "-c", script, "checkpoint", *words], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
