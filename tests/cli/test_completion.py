"""Completion: what a shell is told for a line, and that the printed scripts are ones that shells read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import argcomplete
import pytest

from dualroute.cli import STAGES, main
from dualroute.cli.completion import SHELLS, parser_for
from dualroute.cli.schema import schema_of
from tests.conftest import ROOT


def words_after(line: str) -> list[str]:
    """How the last word of a line may go on."""
    words = line.split(" ")
    parser = parser_for([word for word in words if word])
    finder = argcomplete.CompletionFinder(parser, always_complete_options=True)
    found = finder._get_completions(words[:-1], words[-1], "", None)
    return [word.rstrip() for word in found]


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("dualroute ", {"pretrain", "checkpoint", "completion", "runs", "data", "submit"}),
        ("dualroute pre", {"prepare", "pretrain", "predict"}),
        ("dualroute pretrain --train.pre", {"--train.precision"}),
        ("dualroute pretrain --train.precision bf", {"bf16-mixed", "bf16-true"}),
        ("dualroute pretrain --config pretrain/q", {"pretrain/quality", "pretrain/quickstart"}),
        ("dualroute export --format g", {"gguf"}),
        ("dualroute checkpoint ", {"list", "verify", "export", "convert"}),
        ("dualroute checkpoint export --dty", {"--dtype"}),
        ("dualroute data ", {"verify", "show"}),
        ("dualroute data verify --da", {"--data"}),
        ("dualroute runs compare --pl", {"--plot"}),
        ("dualroute runs --js", {"--json"}),
        ("dualroute submit pre", {"pretrain"}),
        ("dualroute submit --gpus", {"--gpus_per_node"}),
        ("dualroute configs show suite/r", {"suite/ruler"}),
        ("dualroute completion z", {"zsh"}),
        ("dualroute generate --stream ", {"true", "false"}),
    ],
)
def test_a_word_goes_on(line, some):
    found = words_after(line)
    assert some <= set(found)
    last = line.rpartition(" ")[2]
    assert all(word.startswith(last) for word in found)


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_of_every_command_is_offered(stage):
    found = words_after(f"dualroute {stage} --")
    assert {f"--{key}" for key in schema_of(STAGES[stage].config_class()).options} <= set(found)


def test_the_script_is_one_that_the_shell_reads(capsys):
    for shell in SHELLS:
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert "dualroute" in script
        if shutil.which(shell):
            check = [shell, "-n"] if shell != "fish" else ["fish", "--no-execute"]
            assert subprocess.run(check, input=script, text=True, capture_output=True).returncode == 0
    assert main(["completion", "tcsh"]) == 2
    assert "bash|zsh|fish" in capsys.readouterr().err


def test_bash_asks_the_command_itself():
    """As Tab does: the real process, with the variables of the protocol, answers on descriptor 8."""
    line = "dualroute quantize --schem"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    script = f"{sys.executable} -X importtime -m dualroute 8>&1 9>/dev/null"
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env={**os.environ, **asked}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["--scheme"]
    assert "| torch\n" not in done.stderr
