import json
import os

import pytest
import torch
from safetensors.torch import save_file

from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint import format as checkpoint_format
from dualroute.model.checkpoint.format import find_checkpoint, load_model, save_model

CONFIG = ModelConfig(vocab_size=30, dim=16, num_layers=1, num_heads=2, window=4, block=16)


def write(folder, step, config=CONFIG, **metadata):
    torch.manual_seed(step)
    target = folder / checkpoint_format.step_folder(step)
    target.mkdir(parents=True)
    model = DualRoutingTransformer(config)
    save_file(dict(model.named_parameters()), target / checkpoint_format.WEIGHTS)
    (target / checkpoint_format.CONFIG).write_text(json.dumps(config.to_dict()))
    described = {"step": step, "files": checkpoint_format.describe_files(target), **metadata}
    (target / checkpoint_format.METADATA).write_text(json.dumps(described))
    return model


def test_a_model_comes_back_as_it_was_saved(tmp_path):
    model = write(tmp_path, 3).eval()
    loaded = load_model(find_checkpoint(tmp_path))
    ids = torch.arange(20).view(1, 20)
    assert torch.equal(loaded(ids), model(ids))
    assert loaded.head.weight is loaded.embedding.weight
    assert not loaded.training


def test_a_run_folder_means_its_newest_finished_checkpoint(tmp_path):
    for step in (5, 40):
        write(tmp_path / "checkpoints", step)
    (tmp_path / "checkpoints" / "step-00000090").mkdir()  # no metadata: not finished
    (tmp_path / "checkpoints" / ".writing-step-00000099").mkdir()
    assert checkpoint_format.find_checkpoint(tmp_path).step == 40
    assert checkpoint_format.find_checkpoint(tmp_path / "checkpoints").step == 40
    assert checkpoint_format.find_checkpoint(tmp_path / "checkpoints" / "step-00000005").step == 5


def test_nothing_there_is_said_so(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        checkpoint_format.find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no finished checkpoint"):
        checkpoint_format.find_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_names_the_file(tmp_path, damage):
    write(tmp_path, 1)
    path = tmp_path / "step-00000001" / checkpoint_format.WEIGHTS
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[:-10])
    elif damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(UserError, match=checkpoint_format.WEIGHTS):
        load_model(find_checkpoint(tmp_path))


def test_weights_of_another_shape_name_the_parameter(tmp_path):
    write(tmp_path, 1)
    other = DualRoutingTransformer(ModelConfig(**{**CONFIG.to_dict(), "ffn_dim": 128}))
    weights = {name: tuple(p.shape) for name, p in other.named_parameters()}
    with pytest.raises(UserError, match=r"layers\.0\.ffn\.down\.weight"):
        checkpoint_format.check_weights(load_model(find_checkpoint(tmp_path)), weights, "x")


def test_damaged_metadata_is_named(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "step-00000001" / checkpoint_format.METADATA).write_text('{"step"')
    with pytest.raises(UserError, match=checkpoint_format.METADATA):
        checkpoint_format.find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", None), ("step", "1"), ("step", -1), ("step", True), ("step", 1.5), ("tokens", "many"),
        ("val_loss", "low"), ("train_loss", []), ("state_layout", 3), ("quantization", "int8"),
        ("files", []), ("files", {"a": 3}), ("files", {"a": {"size": "1", "sha256": ""}}),
        ("files", {"a": {"size": 1}}), ("files", {"../a": {"size": 1, "sha256": ""}}),
        ("files", {"/etc/passwd": {"size": 1, "sha256": ""}}),
    ],
)  # fmt: skip
def test_values_of_another_type_are_damage(tmp_path, key, value):
    write(tmp_path, 1)
    path = tmp_path / "step-00000001" / checkpoint_format.METADATA
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=rf"{path} is damaged \(.*: use another") as error:
        find_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


NOT_OURS = [b"", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"step": 1', "folder", "pipe"]
READERS = {
    checkpoint_format.METADATA: lambda path: checkpoint_format.read_checkpoint(path.parent),
    checkpoint_format.CONFIG: ModelConfig.from_file,
}


@pytest.mark.parametrize("content", NOT_OURS, ids=lambda content: str(content[:8]))
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_not_ours_is_named(tmp_path, name, content):
    """Nothing is waited for, and nothing else than a UserError comes out."""
    write(tmp_path, 1)
    path = tmp_path / "step-00000001" / name
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="step-00000001") as error:
        READERS[name](path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("values", [{"dim": "wide"}, {"dim": None}, {"num_heads": []}, {"layer_windows": 3}])
def test_a_model_file_with_values_of_another_type_is_named(tmp_path, values):
    (tmp_path / "model.json").write_text(json.dumps({**CONFIG.to_dict(), **values}))
    with pytest.raises(UserError):
        ModelConfig.from_file(tmp_path / "model.json")


def test_one_damaged_checkpoint_hides_no_other(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "step-00000002" / checkpoint_format.METADATA).write_text("{")
    (tmp_path / "step-00000003" / checkpoint_format.METADATA).unlink()
    scan = checkpoint_format.scan_checkpoints(tmp_path)
    assert [c.step for c in scan.finished] == [1]
    assert [path.name for path in scan.damaged] == ["step-00000002"]
    assert [path.name for path in scan.unfinished] == ["step-00000003"]


def test_weights_alone_are_a_checkpoint(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    torch.manual_seed(0)
    model = DualRoutingTransformer(CONFIG).eval()
    saved = save_model(model, tmp_path / "small", tmp_path / "tokenizer.model", {"origin": "a test"})
    ids = torch.arange(20).view(1, 20)
    assert torch.equal(load_model(find_checkpoint(tmp_path / "small"))(ids), model(ids))
    assert saved.step == 0
    assert saved.metadata["origin"] == "a test"
    assert not list(checkpoint_format.damages(saved))
    with pytest.raises(UserError, match="small exists already"):
        checkpoint_format.save_model(model, tmp_path / "small", tmp_path / "tokenizer.model", {})


def test_layers_may_have_windows_top_k_and_widths_of_their_own():
    config = ModelConfig(
        vocab_size=30,
        dim=16,
        num_layers=2,
        num_heads=2,
        block=16,
        layer_windows=[4, 9],
        layer_top_k=[2, 0],
        layer_ffn_dims=[24, 16],
    )
    model = DualRoutingTransformer(config)
    assert [layer.attention.window for layer in model.layers] == [4, 9]
    assert [layer.attention.routing.top_k for layer in model.layers] == [2, 0]
    assert [layer.ffn.down.in_features for layer in model.layers] == [24, 16]
    with pytest.raises(UserError, match="layer_windows is \\[4\\]: give 2 numbers"):
        ModelConfig(num_layers=2, layer_windows=[4])
