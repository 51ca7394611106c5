"""What a start costs, who may import whom, and what happens when nobody reads: processes of their own."""

import ast
import importlib.util
import os
import subprocess
import sys

import pytest

from dualroute.cli.table import FAMILIES, STAGES, load
from tests.conftest import ROOT


def python(*words, cwd=ROOT, **variables):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_no_help_and_no_parser_imports_torch():
    """All stages in one process: help, reading, and the list of commands."""
    done = python(
        "-c",
        """
import contextlib, io, sys
from dualroute.cli import STAGES, main
with contextlib.redirect_stdout(io.StringIO()) as shown:
    for stage in STAGES:
        assert main([*stage.split(), "--help"]) == 0, stage
        main([*stage.split(), "--print_config"])
    assert main(["--help"]) == 0
    assert main(["checkpoint", "export", "--help"]) == 0
    assert main(["submit", "--help"]) == 0
assert "--train.max_steps" in shown.getvalue()
heavy = {"torch", "lightning", "deepspeed", "pyarrow", "transformers"} & sys.modules.keys()
assert not heavy, heavy
""",
    )
    assert done.returncode == 0, done.stderr


def test_every_name_in_the_table_of_commands_is_there():
    for stage in STAGES.values():
        assert stage.config_class()
        assert callable(load(stage.function))
    for family in FAMILIES.values():
        for command in family.commands.values():
            assert callable(load(command.function))


#: As in pyproject.toml, lowest first; what stands on one line may not know each other by name either.
LAYERS = [
    ["attention", "errors", "files", "paths", "settings"], ["model", "data"], ["training", "evaluate"],
    ["distillation"], ["compress", "export"], ["pipeline"], ["estimate", "doctor"], ["cli", "__main__"],
]  # fmt: skip


def test_no_name_of_a_module_points_upward_as_text_either():
    """`importlib.import_module("dualroute.…")` and the table of commands are imports too."""
    floor = {name: number for number, names in enumerate(LAYERS) for name in names}
    upward = []
    for path in sorted((ROOT / "dualroute").rglob("*.py")):
        own = path.relative_to(ROOT / "dualroute").with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) else None
            if not isinstance(text, str) or not text.startswith("dualroute.") or " " in text:
                continue
            parts = text.split(".")
            if parts[1] not in floor or importlib.util.find_spec(".".join(parts[:2])) is None:
                continue
            if floor[parts[1]] > floor.get(own, len(LAYERS)):
                upward.append(f"{path.relative_to(ROOT)}: {text}")
    assert not upward


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of Unix")
@pytest.mark.parametrize("words", ["pretrain --help", "configs", "pipeline --print_config"])
def test_a_reader_that_goes_away_is_no_error(words):
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dualroute", *words.split()]
    done = subprocess.run(
        command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writer)
    assert done.returncode in (0, 141)  # argparse itself says nothing of it
    assert done.stderr == ""


def test_no_message_names_a_package_that_is_not_on_an_index():
    for folder in ("dualroute", "data_prep", "docs", "benchmarks", "launch", "slurm"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".sh", ".sbatch"):
                assert "pip install 'dualroute" not in path.read_text(encoding="utf-8"), path
