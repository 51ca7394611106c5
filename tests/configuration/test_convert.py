"""A text and a type: the value, or what was expected."""

from typing import Any, Literal

import pytest

from dualroute.configuration.convert import convert
from dualroute.configuration.yaml_file import Node, Place, read_text
from dualroute.data.mixture.config import SourceConfig, StageConfig
from dualroute.errors import UserError
from dualroute.paths import ConfigFile, LocalPath, ResumePath


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (int, "12", 12),
        (int, "1e9", 10**9),
        (int, "1.0e9", 10**9),
        (int, "1_000", 1000),
        (int, "10k", 10_000),
        (int, "2M", 2_000_000),
        (int, "1.5G", 1_500_000_000),
        (int, "3T", 3 * 10**12),
        (int, "'7'", 7),
        (int, "010", 10),
        (float, "3e-4", 3e-4),
        (float, "3", 3.0),
        (float, ".5", 0.5),
        (float, "2k", 2000.0),
        (bool, "yes", True),
        (bool, "False", False),
        (str, "32", "32"),
        (str, "'null'", "null"),
        (str, "12:30", "12:30"),
        (Literal["32", "bf16-mixed"], "32", "32"),
        (Literal["a"] | None, "null", None),
        (int | None, "", None),
        (str | None, "~", None),
        (str | None, "'~'", "~"),
        (list[int], "[1, 2k]", [1, 2000]),
        (tuple[float, float], "[0.9, 95e-2]", (0.9, 0.95)),
        (dict[str, float], "{factor: 4}", {"factor": 4.0}),
        (Any, "{a: [1, 2.5, x, null, true, '3']}", {"a": [1, 2.5, "x", None, True, "3"]}),
        (LocalPath | list[LocalPath] | None, "[a, b]", ["a", "b"]),
        (LocalPath | list[LocalPath] | None, "a", "a"),
        (ResumePath, "never", "never"),
    ],
)
def test_values(hint, text, value):
    found = convert(hint, read_text(text, "f"))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("hint", "text", "message"),
    [
        (int, "wide", "expected an integer, got 'wide'"),
        (int, "1.5", "expected an integer, got '1.5'"),
        (int, "2m", "expected an integer, got '2m' .k, M, G and T"),
        (int, "3b", "k, M, G and T"),
        (int, "1:30", "expected an integer"),
        (int, "0x10", "expected an integer"),
        (int, "1e99", "1e99 is too large"),
        (int, "1e999999999", "is too large"),
        (int, "9" * 5000, "is too large"),
        (int, "nan", "expected an integer"),
        (int, "null", "expected an integer, got null"),
        (int, "[1]", "expected an integer, got a list"),
        (int | None, "x", "expected an integer or null, got 'x'"),
        (float, "fast", "expected a number, got 'fast'"),
        (float, "nan", "expected a finite number"),
        (float, ".inf", "expected a number"),
        (float, "1e999", "expected a finite number"),
        (float, "{a: 1}", "expected a number, got a table of keys"),
        (bool, "1", "expected true or false, got '1'"),
        (str, "[a]", "expected text, got a list"),
        (Literal["32", "bf16-mixed"], "bf17-mixed", "32, bf16-mixed, got 'bf17-mixed'; did you mean bf16"),
        (list[str], "ffn", r"expected a list such as \[a, b\], got 'ffn'"),
        (list[int], "[1, x]", "expected an integer, got 'x'"),
        (tuple[float, float], "[1]", "expected a list of 2"),
        (dict[str, float], "4", "expected a table"),
        (LocalPath, "' '", "a path may not be empty"),
        (LocalPath, '"a\\nb"', "holds a control character"),
        (LocalPath, '"a\\0b"', "holds a control character"),
        (LocalPath, "{a: b}", "expected a path, got a table"),
        (LocalPath, "[a]", "expected a path, got a list"),
    ],
)  # fmt: skip
def test_what_is_no_value_of_the_type(hint, text, message):
    with pytest.raises(UserError, match=message) as refused:
        convert(hint, read_text(text, "f"))
    assert len(str(refused.value).splitlines()) == 1


def test_bytes_that_are_no_text_name_a_file_and_nothing_else():
    node = Node("text", "a\udcff", Place("--prompt"))
    assert convert(LocalPath, node) == "a\udcff"
    with pytest.raises(UserError, match="expected UTF-8 text"):
        convert(str, node)


def test_paths_of_a_file_start_where_they_say(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/home/me")

    def path(text, hint=LocalPath, folder=tmp_path / "configs"):
        return convert(hint, read_text(text, "f", folder))

    assert path("data/books") == "data/books"
    assert path("./books") == str(tmp_path / "configs" / "books")
    assert path("../books") == str(tmp_path / "books")
    assert path("$SCRATCH/run") == "/scratch/me/run"
    assert path("${SCRATCH}/$$x") == "/scratch/me/$x"
    assert path("~/runs") == "/home/me/runs"
    assert path("/data") == "/data"
    assert path("other.yaml", ConfigFile) == str(tmp_path / "configs" / "other.yaml")
    # a flag starts in the working directory; its shell has put in the variables
    assert path("../books", folder=None) == "../books"
    assert path("$SCRATCH", folder=None) == "$SCRATCH"
    assert path("~/runs", folder=None) == "/home/me/runs"
    with pytest.raises(UserError, match=r"\$NOWHERE is not set in the environment"):
        path("$NOWHERE/x")
    with pytest.raises(UserError, match=r"a \$ without a name"):
        path("a$/x")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("data/a=0.7", [SourceConfig("data/a", 0.7)]),
        ("[data/a=0.7, data/b=3e-1]", [SourceConfig("data/a", 0.7), SourceConfig("data/b", 0.3)]),
        (
            "[a=b/c, {path: x, name: y, max_epochs: 4}]",
            [SourceConfig("a=b/c"), SourceConfig("x", None, "y", 4.0)],
        ),
        ("[]", []),
    ],
)
def test_entries_of_a_list_are_tables_or_words(text: str, value: Any) -> None:
    assert convert(list[SourceConfig], read_text(text, "--data.sources")) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{path: a, wieght: 0.7}]", "unknown key 'wieght'; did you mean weight?"),
        ("[{weight: 0.7}]", "path must be given in a table of keys"),
        ("[{path: a, weight: much}]", "weight: expected a number or null, got 'much'"),
        ("[[a]]", "expected a table of keys and values, got a list"),
        ("null", "expected a list such as"),
    ],
)
def test_an_entry_that_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        convert(list[SourceConfig], read_text(text, "--data.sources"))
    assert message in str(caught.value)


def test_a_stage_in_one_word() -> None:
    stage = StageConfig(2 * 10**9, {"books": 0.5, "code": 0.5})
    assert convert(list[StageConfig], read_text("2G:books=0.5,code=0.5", "--data.stages")) == [stage]
    with pytest.raises(UserError, match="expected FROM_TOKENS:NAME=WEIGHT"):
        convert(list[StageConfig], read_text("books=0.5", "--data.stages"))
