"""The folder is mathematics: it imports torch and the standard library, nothing else."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import dualroute.attention

ALLOWED = {"torch", *sys.stdlib_module_names}


def test_only_torch_and_the_standard_library() -> None:
    folder = Path(dualroute.attention.__file__).parent
    files = sorted(folder.rglob("*.py"))
    assert len(files) > 40
    for file in files:
        allowed = ALLOWED | {"triton"} if file.is_relative_to(folder / "backends" / "triton") else ALLOWED
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "."]
            for name in names:
                ours = name.startswith("dualroute.attention")
                assert ours or name.split(".")[0] in allowed, f"{file.name} imports {name}"
                assert not (ours and file.name == "reference.py"), (
                    "the specification shares nothing with fast code"
                )


def test_every_exported_name_exists() -> None:
    for name in dualroute.attention.__all__:
        assert getattr(dualroute.attention, name) is not None
