import io

import pytest

from dualroute.errors import UserError
from dualroute.evaluate.load import load
from dualroute.evaluate.sample import GenerateConfig, generate_command, generate_text
from dualroute.model import SamplingConfig


def test_the_same_seed_writes_the_same_text_streamed_or_not(checkpoint, capsys):
    sampling = SamplingConfig(max_new_tokens=40, seed=5)
    texts = []
    for stream in (True, False):
        generate_command(GenerateConfig(str(checkpoint), "The old", sampling, stream=stream))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("The old")
    assert len(texts[0]) > len("The old\n")


def test_pieces_are_whole_characters(checkpoint, monkeypatch):
    loaded = load(checkpoint)
    spelled = loaded.tokenizer.encode("é中🙂", bos=False)
    assert len(spelled) >= 9  # not in the vocabulary: byte by byte

    import dualroute.evaluate.sample as sample

    monkeypatch.setattr(sample, "generate", lambda *_: iter([*spelled, loaded.tokenizer.eos_id, 50]))
    pieces = list(generate_text(loaded.model, loaded.tokenizer, "a", SamplingConfig()))
    assert "".join(pieces) == "é中🙂"
    assert [p for p in pieces if p] == ["é", "中", "🙂"]


def test_a_prompt_comes_from_standard_input(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("A red"))
    generate_command(GenerateConfig(str(checkpoint), "-", SamplingConfig(max_new_tokens=3)))
    assert capsys.readouterr().out.startswith("A red")


def test_a_prompt_without_room_is_refused(checkpoint):
    with pytest.raises(UserError, match="at most 128"):
        generate_command(GenerateConfig(str(checkpoint), "old river " * 200))


def test_a_terminal_is_not_controlled_by_a_model(checkpoint, capsys, monkeypatch):
    import dualroute.evaluate.sample as sample

    monkeypatch.setattr(sample, "generate_text", lambda *_: iter(["\x1b[2J", "\ta\n"]))
    for stream in (True, False):
        config = GenerateConfig(str(checkpoint), "\x07", stream=stream)
        generate_command(config)
        assert capsys.readouterr().out == "\x07\x1b[2J\ta\n\n"
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        generate_command(config)
        assert capsys.readouterr().out == "\\x07\\x1b[2J\ta\n\n"
        monkeypatch.setattr("sys.stdout.isatty", lambda: False)


def test_a_prompt_that_is_no_text_or_endless_is_refused(checkpoint, monkeypatch):
    import dualroute.evaluate.sample as sample

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    with pytest.raises(UserError, match="standard input is not UTF-8 text"):
        generate_command(GenerateConfig(str(checkpoint), "-"))
    monkeypatch.setattr(sample, "MOST_CHARACTERS", 3)
    monkeypatch.setattr("sys.stdin", io.StringIO("abcd"))
    with pytest.raises(UserError, match="more than 3 characters"):
        generate_command(GenerateConfig(str(checkpoint), "-"))
