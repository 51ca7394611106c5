"""Recordings: their frames, classes of them, and what is said in them."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dualroute.cli import main
from dualroute.model.checkpoint.format import find_checkpoint
from dualroute.tasks.config import AudioConfig, TaskConfig
from dualroute.tasks.data.audio import frames_of, resampled, samples_of
from dualroute.tasks.kind import BadRow, Setting
from dualroute.tasks.kinds.recognition import Recognition
from dualroute.tasks.kinds.speech import Recordings
from dualroute.tasks.losses import ctc
from tests.tasks.made import SMALL, write_jsonl

soundfile = pytest.importorskip("soundfile")

RATE = 4000
PITCH = {"a": 300, "b": 700, "c": 1200}
AUDIO = (
    "--task.audio.rate 4000 --task.audio.mels 12 --task.audio.hop 80 --task.audio.frame 160 "
    "--model.causal false --model.block 8 --model.sub_block 8 --model.window 4"
).split()
CONFIG = AudioConfig(RATE, 12, 80, 160, 2)


def tone(letter: str, seconds: float, seed: int = 0, rate: int = RATE) -> Any:
    draw = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    sound = np.sin(2 * np.pi * PITCH[letter] * time + draw.uniform(0, 6)) * draw.uniform(0.2, 0.8)
    return (sound + 0.01 * draw.standard_normal(len(time))).astype(np.float32)


def run(data: Path, output: Path, *more: str) -> int:
    return main(["finetune", *SMALL[:-2], *AUDIO, "--data.path", str(data), "--output", str(output), *more])


def test_frames_have_mean_zero_and_deviation_one() -> None:
    frames = frames_of({}, tone("a", 1.0), CONFIG)
    assert frames.shape == (26, 24)  # 51 frames, two by two, the last one filled up
    assert abs(frames.mean()) < 0.05
    assert abs(frames.std() - 1) < 0.05


def test_the_band_of_a_tone_is_the_loudest() -> None:
    bands = [frames_of({}, tone(letter, 0.5), CONFIG).reshape(-1, 12).mean(0).argmax() for letter in "abc"]
    assert bands == sorted(set(bands))


def test_other_rates_and_channels_give_the_same_frames(tmp_path: Path) -> None:
    """A recording at twice the rate, in stereo, is the same sound."""
    generator = np.random.default_rng(0)
    slow = generator.standard_normal(RATE).astype(np.float32)
    fast = resampled(slow, RATE, 2 * RATE)
    soundfile.write(tmp_path / "fast.wav", np.stack([fast, fast], 1), 2 * RATE, subtype="FLOAT")
    row = {"audio": str(tmp_path / "fast.wav")}
    back = samples_of(row, row["audio"], RATE)
    assert len(back) == RATE
    middle = slice(100, -100)
    assert np.corrcoef(back[middle], slow[middle])[0, 1] > 0.95
    left = np.stack([slow, 0 * slow], 1)  # channels are averaged
    np.testing.assert_allclose(samples_of({}, left, RATE), slow / 2)
    decoded = {"array": fast, "sampling_rate": 2 * RATE}  # as the datasets library gives it
    np.testing.assert_allclose(samples_of({}, decoded, RATE), back, atol=1e-6)


def test_recordings_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, dtype=np.float32), RATE)
    (tmp_path / "damaged.wav").write_bytes(b"RIFF0000WAVEnothing")
    for value, reason in (
        (str(tmp_path / "empty.wav"), "an empty recording"),
        (str(tmp_path / "damaged.wav"), "is damaged"),
        (str(tmp_path / "none.wav"), "not there"),
        (np.zeros(10, np.float32), "shorter than one frame"),
        (np.full(500, np.nan, np.float32), "no numbers"),
        ({"array": np.zeros(500)}, "without a sampling_rate"),
        (None, "no recording"),
        ([[1.0], "x"], "neither a file nor samples"),
    ):
        with pytest.raises(BadRow, match=reason):
            frames_of({}, value, CONFIG)


def test_silence_is_no_division_by_zero() -> None:
    assert np.isfinite(frames_of({}, np.zeros(2000, np.float32), CONFIG)).all()


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of classes, a tone in each recording."""
    folder = tmp_path_factory.mktemp("tones")
    for number in range(120):
        letter = "abc"[number % 3]
        (folder / letter).mkdir(exist_ok=True)
        sound = tone(letter, 0.2 + number % 7 * 0.04, number)
        soundfile.write(folder / letter / f"{number}.wav", sound, RATE)
    return folder


def test_tones_are_told_apart_and_answered(tones: Path, tmp_path: Path) -> None:
    assert run(tones, tmp_path / "run", "--task.kind", "speech", "--train.epochs", "10") == 0
    assert find_checkpoint(tmp_path / "run").metadata["score"]["value"] > 0.9
    output = tmp_path / "answers.jsonl"
    asked = ["predict", "--checkpoint", str(tmp_path / "run"), "--input", str(tones), "--output", str(output)]
    assert main(asked) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert sum(line["prediction"] == line["label"] for line in lines) > 110


def test_the_baseline_of_recordings() -> None:
    kind = Recordings(TaskConfig("speech", audio=CONFIG), Setting(None, 99))  # type: ignore[arg-type]
    rows = [{"audio": tone("abc"[n % 3], 0.3, n), "label": "abc"[n % 3]} for n in range(30)]
    kind.fit(rows)
    answers = kind.baselines()["nearest mean spectrum"](rows[:15], rows[15:])
    assert kind.score([kind.target(row) for row in rows[15:]], answers)["accuracy"] == 1.0


def recognition(texts: list[str]) -> Recognition:
    kind = Recognition(TaskConfig("recognition", audio=CONFIG), Setting(None, 99))  # type: ignore[arg-type]
    kind.fit([{"text": text} for text in texts])
    return kind


def test_the_loss_of_packed_recordings_is_the_sum_of_each_ones() -> None:
    """Against a literal sum over all ways to spell the text."""
    torch.manual_seed(0)
    sizes, texts = (3, 4, 2), ([1, 2], [1, 1], [2])
    outputs = torch.randn(sum(sizes), 3, dtype=torch.float64, requires_grad=True)
    labels = torch.full((sum(sizes),), -100)
    segments = torch.tensor([7, 8, 5]).repeat_interleave(torch.tensor(sizes))
    want, at = 0.0, 0
    for size, text in zip(sizes, texts, strict=True):
        labels[at : at + len(text)] = torch.tensor(text)
        logs = outputs[at : at + size].log_softmax(1)
        ways = torch.cartesian_prod(*[torch.arange(3)] * size).tolist()
        spelt = [way for way in ways if [n for n, _ in groupby(way) if n] == text]
        sums = torch.stack([sum(logs[step, n] for step, n in enumerate(way)) for way in spelt])
        want, at = want - sums.logsumexp(0), at + size
    sums = ctc(outputs, labels, segments)
    torch.testing.assert_close(sums.total, want)
    assert int(sums.count) == 5
    grads = [torch.autograd.grad(value, outputs)[0] for value in (sums.total, want)]
    torch.testing.assert_close(*grads)


def test_a_batch_without_recordings_has_a_loss() -> None:
    outputs = torch.zeros(0, 3, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.long)
    sums = ctc(outputs, empty, empty)
    sums.total.backward()
    assert float(sums.total.detach()) == 0.0


def test_repetitions_and_nones_are_left_out() -> None:
    kind = recognition(["ab b"])
    outputs = np.eye(4, dtype=np.float32)[[0, 2, 2, 0, 3, 0, 3, 3, 1, 3]]  # -, a, a, -, b, -, b, b, " ", b
    kept = kind.reduce(outputs, None)  # type: ignore[arg-type]
    assert kind.labels == ["", " ", "a", "b"]
    assert kind.decode({}, [type("P", (), {"output": kept})()]) == {"prediction": "abb b"}  # type: ignore[list-item]
    assert kind.score(["ab b", "a"], [{"prediction": "ab a"}, {"prediction": "a"}])["wer"] == pytest.approx(
        1 / 3
    )


def test_texts_that_do_not_fit_their_recordings() -> None:
    kind = recognition(["ab"])
    sound = tone("a", 0.12, 0)  # 7 frames: 4 steps
    for text in ("aba", "aab", "abab"):  # three characters, one of them twice, four
        assert kind.encode({"audio": sound, "text": text})[0].count_targets() == len(text)
    for text, reason in (
        ("aabb", "too short"),
        ("ababa", "too short"),
        ("abc", "that the training texts do not have"),
        ("  ", "empty text"),
        (None, "no text"),
    ):
        with pytest.raises(BadRow, match=reason):
            kind.encode({"audio": sound, "text": text})


@pytest.mark.slow
def test_what_is_said_is_learnt(tmp_path: Path) -> None:
    """Utterances of letters, each a tone: the loss falls, and the whole way to the answers is walked."""
    draw = np.random.default_rng(0)
    rows = []
    (tmp_path / "sounds").mkdir()
    for number in range(40):
        letters = draw.choice(list("abc"), size=draw.integers(2, 5)).tolist()
        pieces = [part for n, letter in enumerate(letters) for part in (tone(letter, 0.12, n), np.zeros(160))]
        soundfile.write(tmp_path / "sounds" / f"{number}.wav", np.concatenate(pieces), RATE)
        rows.append({"audio": f"sounds/{number}.wav", "text": "".join(letters)})
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert run(data, tmp_path / "run", "--task.kind", "recognition", "--train.max_steps", "40") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.6 * losses[0]
    output = tmp_path / "answers.jsonl"
    asked = ["predict", "--checkpoint", str(tmp_path / "run"), "--input", str(data), "--output", str(output)]
    assert main(asked) == 0
    assert len(output.read_text().splitlines()) == 40
