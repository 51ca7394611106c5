"""A trained model that runs begin with."""

from pathlib import Path

import pytest

from tests.training.checkpointing.runs import pretrain


@pytest.fixture(scope="package")
def base(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps; read only."""
    output = tmp_path_factory.mktemp("base") / "run"
    assert pretrain(tiny_dataset, output, 5, "--model.tie_embeddings", "false") == 0
    return output
