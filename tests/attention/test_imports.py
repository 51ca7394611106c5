"""The folder is mathematics: it imports torch and the standard library, downward, and never in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import dualroute.attention

ALLOWED = {"torch", *sys.stdlib_module_names}
FOLDER = Path(dualroute.attention.__file__).parent
NAME = "dualroute.attention"
FILES = {
    ".".join((NAME, *path.relative_to(FOLDER).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(FOLDER.rglob("*.py"))
}


def imported(module: str) -> set[str]:
    """Names of modules that a file imports, wherever in it: in functions, for types only, or by a string."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in FILES else node.module or "." for name in inside}
        elif isinstance(node, ast.Constant) and node.value in FILES:
            names.add(str(node.value))
    return names


def test_only_torch_and_the_standard_library() -> None:
    assert len(FILES) > 40
    for module in FILES:
        allowed = ALLOWED | {"triton"} if module.startswith(f"{NAME}.backends.triton") else ALLOWED
        for name in imported(module):
            ours = name.startswith(NAME)
            assert ours or name.split(".")[0] in allowed, f"{module} imports {name}"
            assert not (ours and module == f"{NAME}.reference"), (
                "the specification shares nothing with fast code"
            )


def test_there_is_no_circle_of_files() -> None:
    graph = {module: imported(module) & FILES.keys() for module in FILES}
    assert sum(map(len, graph.values())) > 100
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index(f"{NAME}.core.layout") < order.index(f"{NAME}.layer")


def test_the_core_and_the_back_ends_import_nothing_above_them() -> None:
    core, backends = f"{NAME}.core", f"{NAME}.backends"
    for module in FILES:
        ours = {name for name in imported(module) if name.startswith(NAME)}
        if module.startswith(core):
            assert all(name.startswith(core) for name in ours), module
        elif module.startswith(f"{backends}.torch"):
            assert all(name.startswith((core, f"{backends}.torch")) for name in ours), module
        elif module.startswith((f"{backends}.cpp", f"{backends}.triton")):
            own = module.split(".")[3]
            below = (core, f"{backends}.{own}", f"{backends}.torch")
            assert all(name.startswith(below) or name == backends for name in ours), module


def test_every_exported_name_exists() -> None:
    for name in dualroute.attention.__all__:
        assert getattr(dualroute.attention, name) is not None


def test_the_options_need_no_torch() -> None:
    """A configuration is checked by them, and a command's help must not wait for torch."""
    program = "import sys, dualroute.attention.core.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
