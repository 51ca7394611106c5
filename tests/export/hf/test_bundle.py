"""Source files that travel: all that is reached, nothing of the package left, nothing else changed."""

import ast
import difflib
import importlib
import re

import pytest

from dualroute.export.hf import bundle as bundling
from dualroute.export.hf.bundle import bundle, source_file
from dualroute.export.hf.folder import MEDIA, ROOTS

PROCESSORS = [f"dualroute.export.hf.{name}_dualroute" for name in ("image_processing", "feature_extraction")]
ALL = [*ROOTS, MEDIA, *PROCESSORS]


def test_everything_that_is_imported_comes_along(tmp_path):
    files = bundle(ALL, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert "modeling_dualroute.py" in files
    assert "dualroute_attention_core_router.py" in files
    assert not any(name in file for file in files for name in ("triton", "training", "evaluate"))
    for file in files:
        for node in ast.walk(ast.parse((tmp_path / file).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in files
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not any(name.startswith("dualroute") for name in names)


def test_only_lines_that_import_differ(tmp_path):
    bundle(ALL, tmp_path)
    ours = source_file("dualroute.attention.layer").read_text().splitlines()
    theirs = (tmp_path / "dualroute_attention_layer.py").read_text().splitlines()
    assert theirs[0] == "# SPDX-License-Identifier: Apache-2.0"
    changed = [line for line in difflib.ndiff(ours, theirs[2:]) if line[0] in "+-"]
    assert len(changed) > 10
    assert all(re.match(r"[+-] from (dualroute\.|\.dualroute_)[\w.]+ import", line) for line in changed)


def test_an_import_that_cannot_be_rewritten_is_refused(tmp_path, monkeypatch):
    source = tmp_path / "odd.py"
    source.write_text("import dualroute.errors\n")
    monkeypatch.setattr(bundling, "source_file", lambda module: source)
    with pytest.raises(ValueError, match=r"imports dualroute\.errors in a way that cannot be bundled"):
        bundle(["dualroute.odd"], tmp_path)


def test_substitutes_have_every_name_that_is_asked_of_them(tmp_path):
    asked = {f"{bundling.stem(module)}": set() for module in bundling.SUBSTITUTES}
    for file in bundle(ALL, tmp_path):
        for node in ast.walk(ast.parse((tmp_path / file).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in asked:
                asked[node.module] |= {alias.name for alias in node.names}
    for module, substitute in bundling.SUBSTITUTES.items():
        assert asked[bundling.stem(module)] <= set(vars(importlib.import_module(substitute)))
