"""A source distribution and a wheel that is built of it: whole, and of use outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from dualroute import __version__
from tests.conftest import ROOT, write_corpus
from tests.repository import commands as pages

pytestmark = pytest.mark.slow
#: What is no part of a checkout.
_MADE = shutil.ignore_patterns(
    "__pycache__", "*.egg-info", ".*cache*", ".git", ".venv", "build", "dist", "runs", "data"
)
_BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
_SHAPE = "--model.dim 32 --model.num_layers 1 --model.num_heads 2 --model.window 16 --model.block 16"
_BATCH = "--data.context 64 --model.max_context 256 --train.micro_batch 2 --train.tokens_per_batch 256"
_COURSE = "--train.max_tokens null --train.max_steps 3 --optim.warmup_steps 1 --monitor.peak_tflops 0.1"
#: Commands of the README that are run, and what makes seconds of their hours; the last value of a flag holds.
SHORT = {
    "prepare": "--corpus corpus --vocab_size 320 --val_fraction 0.1 --progress false",
    "pretrain": f"{_SHAPE} {_BATCH} --train.precision 32 --data.val_tokens null {_COURSE}",
    "evaluate": "--context 64 --max_tokens 512",
    "generate": "--sampling.max_new_tokens 8",
    "report": "",
    "runs": "",
}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """(folder with both files and the unpacked wheel in ``site``)."""
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=lambda *of: _ignored(*of))

    def build(kind, place):
        made = subprocess.run(
            [sys.executable, "-c", _BUILD, kind, folder], cwd=place, capture_output=True, text=True
        )
        assert made.returncode == 0, made.stderr[-2000:]
        return folder / made.stdout.strip().splitlines()[-1]

    sdist = build("build_sdist", source)
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # from Python 3.11.4 on
        archive.extractall(folder)
    wheel = build("build_wheel", folder / f"dualroute-{__version__}")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder


def _ignored(folder, names):
    made = _MADE(folder, names)
    return made if Path(folder) == ROOT else made - {"data", "runs"}  # packages of those names


def run(release, work, *words):
    """A Python outside the checkout, which knows the unpacked wheel alone."""
    variables = {**os.environ, "PYTHONPATH": str(release / "site"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=work, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_nothing_of_the_packages_is_missing(release):
    links = ("_configs/", "_slurm/", "_notebooks/")  # in the checkout; looked at below

    def held(folder):
        files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return {name for name in files if "__pycache__" not in name and not name.startswith(links)}

    site, unpacked = release / "site", release / f"dualroute-{__version__}"
    for package in ("dualroute", "data_prep"):
        assert held(site / package) == held(ROOT / package), package
    for made, real in (("_configs", "configs"), ("_slurm", "slurm"), ("_notebooks", "docs/notebooks")):
        assert held(site / "dualroute" / made) == held(ROOT / real)
    for name in ("configs", "docs", "launch", "slurm", "benchmarks", "tests"):
        assert held(unpacked / name) == held(ROOT / name), name
    for name in ("CHANGELOG.md", "CITATION.cff", "SECURITY.md", "constraints.txt", "mkdocs.yml", ".ci/run"):
        assert (unpacked / name).exists(), name
    metadata = message_from_string((site / f"dualroute-{__version__}.dist-info/METADATA").read_text())
    assert metadata["Version"] == __version__
    assert "docs" in metadata.get_all("Provides-Extra")


#: Names, templates, notebook and completion come from the wheel; asking for them writes nothing else.
ASKED = """
import contextlib, io, pathlib
import dualroute
from dualroute.cli import main

def shown(*words):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert main(list(words)) == 0, words
    return text.getvalue()

site = pathlib.Path(dualroute.__file__).parent
assert site.is_relative_to(pathlib.Path(SITE)), site
assert shown("--version") == f"dualroute {dualroute.__version__}\\n"
assert "pretrain/quickstart" in shown("configs")
assert "corpus: stdlib" in shown("prepare", "--config", "prepare/stdlib", "--print_config")
job = shown("submit", "pretrain", "--config", "pretrain/quickstart", "--dry-run")
assert f"--config {site}/_configs/pretrain/quickstart.yaml" in job
assert f"#SBATCH --output={pathlib.Path.cwd()}/runs/quickstart/slurm/%x-%j.out" in job
assert "dualroute" in shown("completion", "bash")
assert not list(pathlib.Path.cwd().iterdir())
assert shown("notebook") == "first_model.ipynb\\n"
assert [path.name for path in pathlib.Path.cwd().iterdir()] == ["first_model.ipynb"]
"""


def test_the_commands_of_the_readme_run_in_an_empty_folder(release, tmp_path):
    text = "The old bird sees the river.\n" * 20
    corpus = {path.name: path.read_text() for path in write_corpus(tmp_path / "made").iterdir()}
    shutil.rmtree(tmp_path / "made")
    every = [command.words for command in pages.commands(ROOT / "README.md") if command.whole]
    ours = [
        words for words in every if words[0] == "dualroute" and words[1] in SHORT and "--suite" not in words
    ]
    ours = [words for words in ours if "runs/stars" not in words]  # of a task
    assert [words[1] for words in ours] == [
        "prepare",
        "pretrain",
        "evaluate",
        "evaluate",
        "generate",
        "report",
        "runs",
    ]
    lines = [[*words[1:], *SHORT[words[1]].split()] for words in ours]
    lines[3] = [word for word in lines[3] if word != "256"]  # a stride of more than the short context
    lines[3].remove("--stride")
    script = f"SITE = {str(release / 'site')!r}\n{ASKED}"
    script += f"pathlib.Path('held_out.txt').write_text({text!r})\npathlib.Path('corpus').mkdir()\n"
    script += f"for name, text in {corpus!r}.items(): pathlib.Path('corpus', name).write_text(text)\n"
    script += f"for words in {lines!r}: assert main(words) == 0, words\n"
    script += "import dualroute as dr; assert dr.load('runs/mine').metadata['dualroute'] == dr.__version__"
    said = run(release, tmp_path, "-c", script)
    assert "bits per byte" in said
    for artefact in ("runs/mine/config.yaml", "data/mine/manifest.json"):
        assert __version__ in (tmp_path / artefact).read_text(), artefact
