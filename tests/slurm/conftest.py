"""A Slurm of four emulated nodes for the tests of this folder, made by slurm/local_cluster.sh."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from dualroute.cli import main
from dualroute.training.parallel.slurm_port import ports_of_job
from tests.conftest import ROOT

NODES = 4
SCRIPT = ROOT / "slurm" / "local_cluster.sh"


def local_cluster(*arguments):
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


class Cluster:
    """Commands of a user of the cluster."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def run(self, *command):
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job):
        """Everything that Slurm knows of a job, as text: {"JobState": "RUNNING", …}."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait(self, job, state, seconds=150, log=None):
        deadline = time.monotonic() + seconds
        while (now := self.job(job))["JobState"] != state:
            over = now["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
            if over or time.monotonic() > deadline:
                logs = log.read_text()[-3000:] if log and log.exists() else ""
                raise AssertionError(f"job {job} is {now['JobState']}, not {state}\n{logs}")
            time.sleep(0.3)
        return now

    def submit(self, capsys, monkeypatch, *arguments):
        """Job numbers that ``dualroute submit`` printed."""
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        assert main(["submit", *map(str, arguments)]) == 0, capsys.readouterr().err
        return re.findall(r"^job (\d+):", capsys.readouterr().out, re.M)


@contextlib.contextmanager
def listening(port):
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # somebody else has it: just as well
            other.bind(("", port))
            other.listen()
        yield


@pytest.fixture(scope="session")
def cluster():
    # not pytest's own temporary folder, which the user munge may not enter
    folder = Path(tempfile.mkdtemp(prefix="dualroute-slurm-"))
    started = local_cluster("up", "--nodes", NODES, "--dir", folder)
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None or os.geteuid() != 0:
        assert started.returncode == 2
        pytest.skip(started.stderr.strip())
    assert started.returncode == 0, started.stderr
    assert f"export SLURM_CONF={folder}/slurm.conf" in started.stdout
    try:
        with contextlib.ExitStack() as others:
            for job in range(1, 4):  # the ports that the first jobs would like to have are taken
                others.enter_context(listening(next(ports_of_job({"SLURM_JOB_ID": str(job)}))))
            yield Cluster(folder)
    finally:
        stopped = local_cluster("down", "--dir", folder)
    assert stopped.returncode == 0, stopped.stderr
    left = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True).stdout
    assert not left, "processes of the cluster are left"
    shutil.rmtree(folder)
