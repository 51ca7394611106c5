"""Files from outside: what stands in them with its place, and one line for everything that is no YAML."""

import os
import time

import pytest

from dualroute.configuration.yaml_file import MOST_BYTES, plain, read_file, read_text
from dualroute.errors import UserError


def write(folder, content):
    path = folder / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_every_value_knows_its_line(tmp_path):
    path = write(tmp_path, "a: 1\nb:\n  c: [x, '32']\n")
    node = read_file(path)
    items = node.content["b"].content["c"]
    assert str(items.place) == f"{path}:3"
    assert [item.content for item in items.content] == ["x", "32"]
    assert [item.quoted for item in items.content] == [False, True]
    assert read_file(write(tmp_path, "# nothing\n")).content == {}


def test_anchors_and_merges_are_followed():
    node = read_text("base: &b {x: 1, y: 2}\nmore: {<<: *b, y: 3}\n", "f")
    assert plain(node)["more"] == {"x": 1, "y": 3}


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join(f'*a{i - 1}' for _ in range(9))}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' stands twice, in line 1 and in line 3: keep one"),
        ("a:\n  b: 1\n  b: 1\n", "the key 'b' stands twice, in line 2 and in line 3"),
        ("a: {b: 1\n", r"run.yaml:\d is not valid YAML"),
        ("a:\n\tb: 1\n", "run.yaml:2 is not valid YAML.*spaces, not with tabs"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML"),
        ("a: !!python/object/apply:os.system [x]\n", "run.yaml:1: the tag"),
        ("a: !!python/name:os.system\n", "the tag .* is not understood: leave it out"),
        ("[1, 2]\n", "holds no table"),
        ("text\n", "holds no table"),
        ("? [a]\n: 1\n", "a key must be a word"),
        ("a: &a [*a]\n", "an alias that contains itself"),
        ("a: *b\n", "undefined alias"),
        ("<<: 3\n", "<< takes a table"),
        (BOMB, "holds more than 20,000 values"),
        ("a: " + "[" * 1200, "nested deeper than 32 levels"),
        ("a: " + "[" * 40 + "]" * 40, "nested deeper than 32 levels"),
        (b"a: \xff\xfe\n", "is not UTF-8 text .byte 3.: save it as UTF-8"),
        (b"a: \x00\n", "is not valid YAML"),
        (b"a: 1\n" + b"#" * MOST_BYTES, "larger than 256 KiB"),
    ],
)
def test_what_is_no_configuration_is_refused_in_one_line(tmp_path, content, message):
    path = write(tmp_path, content)
    begin = time.monotonic()
    with pytest.raises(UserError, match=message) as refused:
        read_file(path)
    assert "run.yaml" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert time.monotonic() - begin < 20


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        read_file(tmp_path)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match="no regular file"):
        read_file(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_file(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_file(tmp_path / ("n" * 300))
