"""The notebook runs from its first cell to its last, in an empty folder, without a network."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import socket

import pytest

from dualroute.cli import main
from dualroute.configuration.shipped import shipped_folder
from tests.conftest import ROOT

NAME = "first_model.ipynb"


def run_cells(cells):
    """What each cell of code shows: what it prints, then the value of a last expression, as in Jupyter."""
    names, shown = {"__name__": "__main__"}, []
    for number, source in enumerate(cells):
        tree = ast.parse(source)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, f"cell {number}", "exec"), names)
            value = None
            if last is not None:
                value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        shown.append(printed.getvalue() + ("" if value is None else repr(value)))
    return shown


@pytest.mark.slow
def test_the_notebook_runs_in_an_empty_folder(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def refuse(*_):
        raise AssertionError("the notebook asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert main(["notebook"]) == 0
    notebook = json.loads((tmp_path / NAME).read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shown = "\n".join(run_cells(cells))
    assert "bits per byte" in shown
    assert "did you mean 'model.num_heads'" in shown
    losses = ast.literal_eval(next(line for line in shown.splitlines() if line.startswith("[(")))
    assert losses[-1][1] < losses[0][1] - 0.5


def test_what_it_shows_is_of_no_machine():
    text = (ROOT / "docs/notebooks" / NAME).read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] == number for number, cell in enumerate(cells, 1))
    assert not [
        folder for folder in ("/home/", "/root/", "/tmp/", "/work/", "site-packages") if folder in text
    ]


def test_a_copy_is_made_once_and_never_over_another_file(tmp_path, capsys):
    assert (shipped_folder("notebooks") / NAME).samefile(ROOT / "docs/notebooks" / NAME)
    assert main(["notebook", str(tmp_path)]) == 0
    assert str(tmp_path / NAME) in capsys.readouterr().out
    (tmp_path / NAME).write_text("mine")
    for words, said in (
        (["notebook", str(tmp_path)], "is there already"),
        (["notebook", "a", "b"], "write `"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / NAME).read_text() == "mine"
    assert main(["notebook", str(tmp_path / "nowhere")]) == 2
