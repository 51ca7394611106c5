"""What is said when memory or a disk is used up: one line and the remedy; others keep a traceback."""

import errno

import pytest
import torch

from dualroute.cli import entry
from dualroute.errors import exhaustion


def of_the_host():
    return torch.empty(2**60, dtype=torch.uint8)


def of_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total …")


def of_python():
    raise MemoryError


def of_a_fork():
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def of_a_reader():
    raise RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. ")


@pytest.mark.parametrize("used_up", [of_the_host, of_a_gpu, of_python, of_a_fork, of_a_reader])
@pytest.mark.parametrize("command", ["pretrain", "distill", "quantize"])
def test_memory_that_is_used_up_is_one_line_that_names_what_to_lower(used_up, command, monkeypatch, capsys):
    monkeypatch.setattr(entry, "run", lambda arguments: used_up())
    assert entry.main([command]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"dualroute {command}: error: ")
    assert line.count("\n") == 1
    assert "memory" in line
    if command == "quantize":
        assert "smaller batch" in line
    else:
        for key in ("train.micro_batch", "train.activation_checkpointing", "parallel.zero_stage"):
            assert key in line
    if used_up is of_a_reader:
        assert "data.num_workers" in line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_is_used_up_is_named(number, monkeypatch, capsys):
    def full(arguments):
        raise OSError(number, "full", "/data/run/config.yaml")

    monkeypatch.setattr(entry, "run", full)
    assert entry.main(["prepare"]) == 2
    assert "in /data/run/config.yaml: make room there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error"), OSError(errno.EIO, "Input/output error"), ValueError("memory")]
)
def test_a_defect_keeps_its_traceback(error, monkeypatch):
    def fail(arguments):
        raise error

    assert exhaustion(error, "pretrain") is None
    monkeypatch.setattr(entry, "run", fail)
    with pytest.raises(type(error)):
        entry.main(["pretrain"])
