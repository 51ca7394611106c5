"""The model's own source files, made ready to travel with an exported folder.

In: the names of a few modules of this package.  Here: all modules of it that these import, each written as
    one file beside the others, ``dualroute.model.layers`` as ``dualroute_model_layers.py``, with nothing
    changed but the lines that import.  Next: transformers copies what it can reach by ``from .name import``
    and runs it.

Nobody writes the model a second time.  What runs elsewhere is the code that was trained
and tested here, so a folder cannot drift from it.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

from dualroute import __version__

PACKAGE = "dualroute"
#: module → the one whose source stands in for it
SUBSTITUTES = {
    f"{PACKAGE}.attention.backend": f"{PACKAGE}.export.plain_backend",
}
_IMPORT = re.compile(rf"^(?P<indent>\s*)from (?P<module>{PACKAGE}(?:\.\w+)*) import ", re.MULTILINE)


def bundle(roots: list[str], folder: Path) -> list[str]:
    """Write ``roots`` and all that they import of this package into ``folder``.

    Args:
        roots: Module names, such as ``dualroute.model.transformer``.
        folder: Where to; one flat folder.

    Returns:
        The names of the files, sorted.

    Raises:
        ValueError: A module imports from this package in a way that cannot be rewritten.
    """
    waiting, done = list(roots), set()
    while waiting:
        module = waiting.pop()
        if module in done:
            continue
        done.add(module)
        source = SUBSTITUTES.get(module, module)
        text = source_file(source).read_text(encoding="utf-8")
        waiting += _imported(text, source)
        written = _IMPORT.sub(lambda found: f"{found['indent']}from .{stem(found['module'])} import ", text)
        left = _imported(written, source)
        if left:
            raise ValueError(f"{source} imports {', '.join(left)} in a way that cannot be bundled")
        header = (
            f"# SPDX-License-Identifier: Apache-2.0\n"
            f"# {source} of dualroute {__version__}; only its imports of that package were rewritten.\n"
        )
        (folder / f"{stem(module)}.py").write_text(header + written, encoding="utf-8")
    return sorted(f"{stem(module)}.py" for module in done)


def stem(module: str) -> str:
    """File name of a module, without its ending: a root of the export folder keeps its own name."""
    return module.removeprefix(f"{PACKAGE}.export.hf.").replace(".", "_")


def source_file(module: str) -> Path:
    """Where a module's source lies, without importing it."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ValueError(f"{module} has no source file")
    return Path(found.origin)


def _imported(text: str, module: str) -> list[str]:
    """Modules of this package that ``text`` imports, wherever in it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text, module)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names.append(node.module)
    return [name for name in names if name.split(".")[0] == PACKAGE]
