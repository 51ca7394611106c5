"""Every command in the pages is one that the command line takes; those that are marked are run.

``<!-- run -->`` before a block: a test runs it, in one folder for each page.
``<!-- run: COMMAND FLAGS -->``: that command gets these flags besides, so that the test takes seconds.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dualroute.cli import main
from tests.conftest import ROOT, write_corpus
from tests.repository import commands as pages

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_parsed(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DUALROUTE_DATA", "data")  # configurations name it; nothing is read
    problems = [said for command in pages.commands(page) if (said := pages.problem(command)) is not None]
    assert problems == []


def test_mistakes_are_found_and_most_commands_are_seen(tmp_path):
    all_of_them = [command for page in PAGES for command in pages.commands(page)]
    assert len([one for one in all_of_them if one.words[0] == "dualroute"]) > 300
    page = tmp_path / "page.md"
    page.write_text(
        "`dualroute pretrian`, `dualroute pretrain --train.max_step 5`, `dualroute checkpoint lst`\n\n"
        "    dualroute generate --checkpoint RUN --sampling.seed many\n\n"
        "    dualroute pretrain --config configs/pretrain/nowhere.yaml\n\n"
        "```bash\nrun='x'\ndualroute evaluate --checkpoint runs/a \\\n    --dta shards   # a comment\n"
        "dualroute prune --checkpoint runs/a\n"
        "python benchmarks/attention.py speed --lenghts 5\n"
        "torchrun --nproc_per_node 2 launch/pretrain.py --modl.dim 5\n```\n"
    )
    said = [pages.problem(command) for command in pages.commands(page)]
    assert None not in said, said
    assert len(said) == 9


def marked(page: Path) -> list[tuple[str, str, list[str]]]:
    """(language, content, the mark's words) of the blocks that are run."""
    found = []
    for _, language, content, mark in pages.blocks(page.read_text(encoding="utf-8")):
        if mark:
            words = mark.removeprefix("<!-- run").removesuffix("-->").strip().removeprefix(":").split()
            found.append((language, content, words))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first_model", "one_token", "python"])
def test_marked_blocks_run(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus")
    blocks = marked(ROOT / "docs/start" / f"{name}.md")
    assert blocks
    for language, content, more in blocks:
        if language == "python":
            exec(compile(content, f"{name}.md", "exec"), {})
            continue
        for _, words in pages.shell_commands(content):
            assert words[0] == "dualroute", words
            flags = more[1:] if more[:1] == [words[1]] else []
            assert main([*words[1:], *flags]) == 0, (words, capfd.readouterr().err)


def test_no_mark_is_forgotten_and_the_chinese_tutorial_is_the_same():
    with_marks = {page.relative_to(ROOT).as_posix() for page in PAGES if marked(page)}
    run = {f"docs/start/{name}.md" for name in ("first_model", "one_token", "python")}
    assert with_marks == run | {"docs/zh/first_model.md"}
    english = marked(ROOT / "docs/start/first_model.md")
    assert marked(ROOT / "docs/zh/first_model.md") == english[:5]
