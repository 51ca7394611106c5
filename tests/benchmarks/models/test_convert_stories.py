"""The conversion benchmark, at a toy size: healing brings the converted model back towards the original."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from dualroute.data.manifest import Manifest, verify_shards
from dualroute.data.reader import ShardReader

TOY = (
    "--context 64 --train_tokens 8192 --val_tokens 2048 --tokens 10240 --tokens_per_batch 512 --lr 1e-3 "
    "--window 8 --block 8 --top_k 1 --global_mode routed --far_summary second_order "
    "--calibration_tokens 512 --seeds 1"
)


@pytest.mark.slow
@pytest.mark.nightly
def test_healing_closes_the_gap(real_data: Path, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    folder = real_data / "tiny_lms"
    script = pytestconfig.rootpath / "benchmarks" / "models" / "convert_stories.py"
    line = [sys.executable, str(script), "--model", str(folder / "stories260K.bin")]
    line += ["--tokenizer", str(folder / "tok512.bin"), "--output", str(tmp_path), *TOY.split()]
    line += ["--variants", "divide by distance"]
    result = subprocess.run(line, capture_output=True, text=True, cwd=pytestconfig.rootpath)
    assert result.returncode == 0, result.stderr
    with (tmp_path / "convert_stories.csv").open(newline="") as stream:
        original, divided = csv.DictReader(stream)
    assert 0.8 < float(original["converted"].split()[0]) < 2
    converted, healed = (float(divided[key].rstrip(" %")) for key in ("converted", "healed"))
    assert converted > 2
    assert healed < 0.8 * converted

    manifest = Manifest.load(tmp_path / "data")
    texts = {}
    for name, tokens in (("train", 8192), ("val", 2048)):
        verify_shards(manifest, name, level="sha256")
        assert manifest.split(name).tokens == tokens
        reader = ShardReader(manifest, name)
        texts[name] = {tuple(reader.read(i, 0, 64)) for i in range(manifest.split(name).documents)}
        assert {ids[0] for ids in texts[name]} == {1}
    assert not texts["train"] & texts["val"]
