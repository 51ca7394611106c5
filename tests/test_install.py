"""``launch/install.sh`` on a machine whose torch is built for CUDA, and on one whose torch is built for CPUs.

pip resolves and installs for real from a folder of empty wheels: one for each version in constraints.txt, and
a torch with the requirements of either build (those of the CUDA build as published with torch 2.13.0).
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

CUDA_BUILD = [
    "filelock",
    "typing-extensions>=4.10.0",
    "sympy>=1.13.3",
    "networkx>=2.5.1",
    "jinja2",
    "fsspec>=0.8.5",
    "nvidia-cudnn-cu13==9.20.0.48; platform_system == 'Linux'",
    "nvidia-nccl-cu13==2.29.7; platform_system == 'Linux'",
    "triton==3.7.1; platform_system == 'Linux'",
]
CPU_BUILD = [requirement for requirement in CUDA_BUILD if "platform_system" not in requirement]

# What builds the copy of the project: an editable wheel with pyproject.toml's requirements and nothing in it
BACKEND = """
import tomllib, wheels

def build_editable(folder, settings=None, metadata=None):
    project = tomllib.load(open("pyproject.toml", "rb"))["project"]
    extras = project["optional-dependencies"]
    wheels.write(folder, "dualroute", project["version"], project["dependencies"], extras)
    return f"dualroute-{project['version']}-py3-none-any.whl"
"""


def write(folder, name, version, requires=(), extras=None, files=None):  # type: ignore[no-untyped-def]
    """An empty wheel with this metadata; ``files``: {path: text} that it holds.

    The build of the project's copy has it as a file of its own, so it imports what it needs.
    """
    import zipfile
    from pathlib import Path

    escaped = name.replace("-", "_")
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    for extra, of_extra in (extras or {}).items():
        lines.append(f"Provides-Extra: {extra}")
        for requirement in of_extra:
            package, _, marker = requirement.partition(";")
            marker = f"({marker}) and extra == '{extra}'" if marker else f"extra == '{extra}'"
            lines.append(f"Requires-Dist: {package}; {marker}")
    info = f"{escaped}-{version}.dist-info"
    members = {
        **(files or {}),
        f"{info}/METADATA": "\n".join(lines) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*members, f"{info}/RECORD"])
    with zipfile.ZipFile(Path(folder) / f"{escaped}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in (members | {f"{info}/RECORD": record}).items():
            wheel.writestr(path, text)


@pytest.fixture
def install(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A copy of what install.sh reads, and a function that runs it with one build of torch on the index."""
    project, index = tmp_path / "project", tmp_path / "index"
    for folder in (project / "launch", project / "backend", index):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "install.sh", project / "launch")
    shutil.copy(ROOT / "constraints.txt", project)
    text = (ROOT / "pyproject.toml").read_text()
    ours = 'requires = []\nbuild-backend = "ours"\nbackend-path = ["backend"]\n'
    text, count = re.subn(r'requires = \["setuptools.*?\nbuild-backend = .*?\n', ours, text)
    assert count == 1
    (project / "pyproject.toml").write_text(text)
    (project / "backend" / "ours.py").write_text(BACKEND)
    (project / "backend" / "wheels.py").write_text(inspect.getsource(write))
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if version and name != "torch":
            write(index, name, version)
    for version in ("3.7.1", "3.9.0"):
        write(index, "triton", version)
    write(index, "nvidia-cudnn-cu13", "9.20.0.48")
    write(index, "nvidia-nccl-cu13", "2.29.7")
    write(index, "setuptools", "82.0.0")

    def run(requires: list[str], version: str, cuda: str | None) -> subprocess.CompletedProcess[str]:
        built = f"__version__ = {version!r}\ncuda = {cuda!r}\nhip = None\n"
        write(index, "torch", version, requires, files={"torch/__init__.py": "", "torch/version.py": built})
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
        environ |= {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}
        extras = "deepspeed,compress,export,tasks,audio,lora,dev"
        script = ["bash", str(project / "launch" / "install.sh"), extras]
        return subprocess.run(script, env=environ, capture_output=True, text=True, timeout=200)

    run.project = project  # type: ignore[attr-defined]
    return run


def installed(project: Path, name: str) -> str:
    found = list((project / ".venv").glob(f"lib/python*/site-packages/{name}-*.dist-info"))
    assert len(found) == 1, found
    return found[0].name.removeprefix(f"{name}-").removesuffix(".dist-info")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("requires", "version", "cuda", "said"),
    [
        (CUDA_BUILD, "2.13.0", "13.0", "torch 2.13.0, CUDA 13.0"),
        (CPU_BUILD, "2.13.0+cpu", None, "torch 2.13.0+cpu, CPU only"),
    ],
)
def test_both_builds_of_torch_install(install, requires, version, cuda, said):  # type: ignore[no-untyped-def]
    done = install(requires, version, cuda)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == said
    assert installed(install.project, "torch") == version
    assert installed(install.project, "triton") == "3.7.1"
