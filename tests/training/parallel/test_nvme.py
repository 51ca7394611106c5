"""ZeRO-3 with parameters in files: the losses and the resume of a run without; what is missing is named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from dualroute.errors import UserError
from dualroute.training.parallel.strategy import ParallelConfig, World, build_strategy
from tests.training.step.test_module import curve, train

pytest.importorskip("deepspeed")

#: one feed-forward matrix is larger than 1 MiB, below which DeepSpeed writes no file
SHAPE = (
    "--model.dim 128 --model.ffn_dim 2304 --model.num_layers 1 --optim.lr 0.003 --checkpoint.keep_last 9 "
    "--monitor.sample_every_steps 0 --parallel.strategy deepspeed --parallel.zero_stage 3"
).split()


def configuration(folder: Path) -> Path:
    parameters = {"device": "nvme", "nvme_path": str(folder / "nvme"), "buffer_size": 2**20}
    zero = {"offload_param": parameters, "offload_optimizer": {"device": "cpu"}}
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    "DUALROUTE_NVME" not in os.environ,
    reason="DeepSpeed compiles async_io for it, four minutes of a core, once: set DUALROUTE_NVME=1",
)
def test_parameters_in_files_train_and_resume_alike(tiny_dataset: Path, tmp_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("libaio is missing: apt-get install libaio-dev")
    AsyncIOBuilder().load(verbose=False)
    more = (*SHAPE, "--parallel.deepspeed_config", str(configuration(tmp_path)))
    (tmp_path / "nvme").mkdir()
    train(tiny_dataset, tmp_path / "without", 9, *SHAPE)
    train(tiny_dataset, tmp_path / "run", 9, *more)
    files = list((tmp_path / "nvme").rglob("*_param.tensor.swp"))
    assert files
    assert all(path.stat().st_size >= 2**20 for path in files)
    whole, without = curve(tmp_path / "run"), curve(tmp_path / "without")
    assert max(abs(whole[step] - without[step]) for step in without) <= 1e-6
    for step in (8, 9):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    said = train(tiny_dataset, tmp_path / "run", 9, *more)
    assert "step 4 of 9" in said.stdout
    assert curve(tmp_path / "run") == whole


def test_a_missing_libaio_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    config = ParallelConfig("deepspeed", zero_stage=3, deepspeed_config=str(configuration(tmp_path)))
    with pytest.raises(UserError, match="needs libaio and its headers: apt-get install libaio-dev"):
        build_strategy(config, World(), micro_batch=1, accelerator="cpu")


def test_a_folder_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"offload_param": {"device": "nvme"}}}))
    config = ParallelConfig("deepspeed", zero_stage=3, deepspeed_config=str(path))
    with pytest.raises(UserError, match=r"nvme needs a folder: offload_param\.nvme_path"):
        build_strategy(config, World(), micro_batch=1, accelerator="cpu")
