"""A preparation that Slurm does in tasks: the bytes of one process."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from data_prep.prepare import PrepareConfig, prepare
from dualroute.cli import main
from tests.conftest import write_corpus
from tests.data_prep.conftest import files

pytest.importorskip("datatrove", reason="tasks need the extra prepare")
pytest.importorskip("rensa", reason="near duplicates need the extra prepare")
pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(600)]


def test_tasks_of_slurm_make_the_bytes_of_one_process(cluster, tmp_path, monkeypatch):
    write_corpus(tmp_path / "corpus", documents=40)
    options = {"near_duplicates": True, "quality": ["code"], "vocab_size": 320, "val_fraction": 0.1}
    options |= {"shard_size_mb": 0.02, "corpus": str(tmp_path / "corpus"), "progress": False}
    one = prepare(PrepareConfig(**options, output=str(tmp_path / "one"), reserved_tokens=0))

    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "many"
    flags = "--near_duplicates true --quality [code] --vocab_size 320 --val_fraction 0.1".split()
    flags += ["--shard_size_mb", "0.02", "--reserved_tokens", "0", "--corpus", str(tmp_path / "corpus")]
    partition = re.search(r"PartitionName=(\S+)", cluster.run("scontrol", "show", "partition")).group(1)
    words = ["--executor", "slurm", "--partition", partition, "--tasks", "2", "--mem_gb", "1"]
    assert main(["prepare", *flags, "--output", str(output), *words, "--time", "00:10:00"]) == 0

    deadline = time.monotonic() + 500
    while not (output / "manifest.json").exists():
        assert time.monotonic() < deadline, cluster.run("squeue") + logs(output)
        assert cluster.run("squeue", "--noheader"), "every job has ended\n" + logs(output)
        time.sleep(0.5)
    assert files(output) == files(one.folder)


def logs(output: Path) -> str:
    written = sorted(output.with_name(f"{output.name}.tasks").rglob("*.out"))
    return "\n".join(f"{path}\n{path.read_text()[-1500:]}" for path in written)
