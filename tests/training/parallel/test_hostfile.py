"""Two nodes of a hostfile, reached over a real ssh: two loopback addresses of this machine.

Needs sshd and pdsh (Debian: openssh-server pdsh) and root, which may log in to itself; skipped elsewhere.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.training.launchers import free_port
from tests.training.parallel.test_distributed import STABLE, STEPS, assert_same_losses, launch
from tests.training.step.test_module import train

pytest.importorskip("deepspeed")
MISSING = [name for name in ("pdsh", "ssh", "ssh-keygen") if shutil.which(name) is None]
SSHD = shutil.which("sshd") or ("/usr/sbin/sshd" if Path("/usr/sbin/sshd").exists() else None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING) or SSHD is None, reason=f"no {', '.join(MISSING) or 'sshd'} here"),
    pytest.mark.skipif(os.geteuid() != 0, reason="an sshd of one's own that starts sessions needs root"),
]


@pytest.fixture
def sshd(tmp_path):
    """(port, private key) of an sshd on all loopback addresses that lets this user in with that key."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    shutil.copy(tmp_path / "user.pub", tmp_path / "authorized_keys")
    port = free_port()
    Path("/run/sshd").mkdir(exist_ok=True)
    config = tmp_path / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nListenAddress 127.0.0.2\nHostKey {tmp_path}/host\n"
        f"AuthorizedKeysFile {tmp_path}/authorized_keys\nStrictModes no\nUsePAM no\nPidFile none\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\n"
    )
    process = subprocess.Popen([SSHD, "-D", "-f", config, "-E", tmp_path / "sshd.log"])
    try:
        yield port, tmp_path / "user"
    finally:
        process.terminate()
        process.wait(timeout=20)


def test_two_nodes_of_a_hostfile_train_as_one_process_does(sshd, tiny_dataset, tmp_path, monkeypatch):
    port, key = sshd
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    options = (
        f"-p {port} -i {key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o BatchMode=yes"
    )
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", options)
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")  # pdsh hands on what begins with PYTHON
    wait_until_reachable(options)

    train(tiny_dataset, tmp_path / "alone", STEPS, *STABLE)
    launcher = ["-m", "deepspeed.launcher.runner", "--hostfile", str(hosts), "--no_ssh_check"]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    text = launch(launcher, tiny_dataset, tmp_path / "run", STEPS, "--parallel.zero_stage", "1")
    assert "127.0.0.2: " in text  # pdsh says which node a line came from
    assert_same_losses(tmp_path / "run", tmp_path / "alone")


def wait_until_reachable(options):
    deadline = time.monotonic() + 30
    command = ["ssh", *options.split(), "127.0.0.2", "true"]
    while (result := subprocess.run(command, cwd=ROOT, capture_output=True, text=True)).returncode:
        assert time.monotonic() < deadline, result.stderr
        time.sleep(0.2)
