"""Spoken digits for configs/task/digits.yaml and digit_strings.yaml, from the Free Spoken Digit Dataset.

    python benchmarks/data/spoken_digits.py --source fsdd.tar.xz --output digits

    digits/train/DIGIT/*.wav, digits/test/DIGIT/*.wav    single digits, in folders of classes
    digits/strings_train.jsonl, strings_test.jsonl       {"audio": file, "text": "three one four"}: utterances
    of
                                                         3 to 8 digits of one speaker, joined from single
                                                         takes

Takes 0 to 4 of each digit and speaker are the test part, as the data set has it; no take is in both parts.
"""

from __future__ import annotations

import argparse
import json
import re
import tarfile
from collections import defaultdict
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_TAKES = 5
Samples = NDArray[np.float32]
Takes = dict[str, dict[int, list[Samples]]]  # {speaker: {digit: takes}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="fsdd.tar.xz, or the folder of recordings")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--train_strings", type=int, default=4000)
    parser.add_argument("--test_strings", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} is there already: remove it, or give another --output")
    takes: dict[str, Takes] = {part: defaultdict(lambda: defaultdict(list)) for part in ("train", "test")}
    rate = 0
    for name, content in recordings(args.source):
        digit, speaker, number = parsed(name)
        samples, rate = soundfile.read(BytesIO(content), dtype="float32")
        part = "test" if number < TEST_TAKES else "train"
        takes[part][speaker][digit].append(samples)
        folder = args.output / part / WORDS[digit]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / Path(name).name).write_bytes(content)
    for seed, (part, count) in enumerate((("train", args.train_strings), ("test", args.test_strings))):
        write_strings(takes[part], args.output, part, count, rate, args.seed * 2 + seed)


def recordings(source: Path) -> list[tuple[str, bytes]]:
    """(name, content) of the .wav files of an archive or a folder, by name."""
    if source.is_dir():
        return [(file.name, file.read_bytes()) for file in sorted(source.rglob("*.wav"))]
    found = []
    with tarfile.open(source) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".wav"):
                stream = archive.extractfile(member)
                assert stream is not None
                found.append((member.name, stream.read()))
    return sorted(found)


def parsed(name: str) -> tuple[int, str, int]:
    """Digit, speaker and number of a take: DIGIT_SPEAKER_N.wav."""
    match = re.fullmatch(r"(\d)_(\w+)_(\d+)\.wav", Path(name).name)
    if match is None:
        raise SystemExit(f"{name} is not called DIGIT_SPEAKER_N.wav")
    return int(match[1]), match[2], int(match[3])


def write_strings(takes: Takes, output: Path, part: str, count: int, rate: int, seed: int) -> None:
    """Utterances of 3 to 8 digits of one speaker, with pauses of 50 to 200 ms, and their texts."""
    rng = np.random.default_rng(seed)
    (output / f"strings_{part}").mkdir(parents=True)
    speakers = sorted(takes)
    with (output / f"strings_{part}.jsonl").open("w") as lines:
        for number in range(count):
            of_speaker = takes[speakers[rng.integers(len(speakers))]]
            digits = rng.choice(sorted(of_speaker), size=rng.integers(3, 9)).tolist()
            pieces: list[Samples] = []
            for digit in digits:
                choices = of_speaker[digit]
                pieces += [pause(rng, rate), choices[rng.integers(len(choices))]]
            name = f"strings_{part}/{number:05d}.wav"
            soundfile.write(output / name, np.concatenate([*pieces, pause(rng, rate)]), rate)
            text = " ".join(WORDS[digit] for digit in digits)
            lines.write(json.dumps({"audio": name, "text": text}) + "\n")


def pause(rng: np.random.Generator, rate: int) -> Samples:
    """Silence, with a little noise, of 50 to 200 ms."""
    length = int(rng.uniform(0.05, 0.2) * rate)
    return (1e-4 * rng.standard_normal(length)).astype(np.float32)


if __name__ == "__main__":
    main()
