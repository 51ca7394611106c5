import dataclasses
import io
import json

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

    script = [(0, number) for number in [*spelled, loaded.tokenizer.eos_id]]
    monkeypatch.setattr(sample, "generate_batch", lambda *_: iter(script))
    pieces = list(generate_text(loaded.model, loaded.tokenizer, "a", SamplingConfig()))
    assert "".join(pieces) == "é中🙂"
    assert [p for p in pieces if p] == ["é", "中", "🙂"]


def test_several_samples_are_those_of_their_seeds_and_their_numbers_are_written(checkpoint, tmp_path, capsys):
    output = tmp_path / "texts.json"
    sampling = SamplingConfig(max_new_tokens=8, seed=3, logprobs=2)
    config = GenerateConfig(
        str(checkpoint), "The", sampling, samples=3, batch_size=2, output=str(output), scale="local.1=0"
    )
    generate_command(config)
    assert capsys.readouterr().out.count("--- seed ") == 3
    texts = json.loads(output.read_text())["texts"]
    assert [one["seed"] for one in texts] == [3, 4, 5]
    for one in texts:
        again = dataclasses.replace(
            config, samples=1, sampling=dataclasses.replace(sampling, seed=one["seed"])
        )
        generate_command(again)
        assert capsys.readouterr().out == f"The{one['text']}\n"
        tokens = json.loads(output.read_text())["texts"][0]["tokens"]
        assert [token["id"] for token in tokens] == [token["id"] for token in one["tokens"]]
        logprobs = [token["logprob"] for token in one["tokens"]]
        assert [token["logprob"] for token in tokens] == pytest.approx(logprobs, abs=1e-4)
        token = one["tokens"][0]
        assert token["logprob"] <= token["top"][0]["logprob"] <= 0
        assert len(token["top"]) == 2
    with pytest.raises(UserError, match="logprobs are written to --output"):
        GenerateConfig(str(checkpoint), sampling=sampling)
    with pytest.raises(UserError, match="there is no layer 7"):
        generate_command(GenerateConfig(str(checkpoint), "The", scale="global.7=0"))


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
