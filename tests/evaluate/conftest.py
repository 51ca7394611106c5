import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from dualroute.data.manifest import Manifest
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint import format as checkpoint_format


@pytest.fixture(scope="session")
def checkpoint(tiny_dataset, tmp_path_factory):
    """A run folder with one checkpoint of an untrained model for the tiny data set."""
    run = tmp_path_factory.mktemp("run")
    folder = run / "checkpoints" / checkpoint_format.step_folder(1)
    folder.mkdir(parents=True)
    info = Manifest.load(tiny_dataset).tokenizer
    config = ModelConfig(
        vocab_size=info.vocab_size, dim=32, num_layers=2, num_heads=4, window=8, block=16, max_context=128
    )
    torch.manual_seed(0)
    model = DualRoutingTransformer(config)
    with torch.no_grad():  # far from uniform, so that every term of a score counts
        for parameter in model.parameters():
            parameter.mul_(4)
    save_file(dict(model.named_parameters()), folder / checkpoint_format.WEIGHTS)
    (folder / checkpoint_format.CONFIG).write_text(json.dumps(config.to_dict()))
    shutil.copyfile(tiny_dataset / info.file, folder / checkpoint_format.TOKENIZER)
    metadata = {"step": 1, "context": 64, "files": checkpoint_format.describe_files(folder)}
    (folder / checkpoint_format.METADATA).write_text(json.dumps(metadata))
    return run
