"""The tree stays small to the eye, and no text names a file that is not there."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

from tests.conftest import ROOT

TOP = ("benchmarks", "configs", "data_prep", "docs", "dualroute", "launch", "slurm", "tests")
MOST_FILES, MOST_LINES = 15, 500
#: Enumerations: a short file for each task, a page for each field.
ENUMERATIONS = {"configs/task"}
PICTURES = {".png", ".svg"}
_NAMED = re.compile(
    rf"(?<![\w/.-])(?:{'|'.join(TOP)})/[\w/.-]+\.(?:py|sh|md|yaml|json|h|cpp|svg|png|sbatch)\b"
)
_LINKED = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")


@cache
def files() -> list[Path]:
    """Those of the project, not what is made beside them."""
    found = [path for top in TOP for path in (ROOT / top).rglob("*") if path.is_file()]
    found = [path for path in found if "__pycache__" not in path.parts and not path.name.startswith(".")]
    return [*found, *ROOT.glob("*.md"), ROOT / "pyproject.toml"]


def text_of(path: Path) -> str:
    return "" if path.suffix in PICTURES else path.read_text(encoding="utf-8")


def test_no_folder_and_no_file_is_too_long() -> None:
    folders = Counter(str(path.parent.relative_to(ROOT)) for path in files())
    long = {name: count for name, count in folders.items() if count > MOST_FILES}
    assert set(long) <= ENUMERATIONS, long
    lines = {str(path.relative_to(ROOT)): text_of(path).count("\n") for path in files()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_files_that_are_named_are_there() -> None:
    """Tests also make up names, of files that users might have in the folders that are theirs."""
    missing = {
        (str(path.relative_to(ROOT)), name)
        for path in files()
        for name in _NAMED.findall(text_of(path))
        if not (ROOT / name).exists() and "NAME" not in name
    }
    theirs = ("configs/", "docs/")
    assert {
        (path, name) for path, name in missing if path[:6] != "tests/" or not name.startswith(theirs)
    } == set()


def test_links_of_the_documentation_lead_to_files() -> None:
    pages = [path for path in files() if path.suffix == ".md"]
    links = [(page, link) for page in pages for link in _LINKED.findall(text_of(page))]
    assert len(links) > 50
    assert [(str(page), link) for page, link in links if not (page.parent / link).exists()] == []
