"""Images from rows to answers: arrays, files, and what is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dualroute.cli import main
from dualroute.model.checkpoint.format import find_checkpoint
from dualroute.model.config import ModelConfig
from dualroute.tasks.data.problems import Problems
from dualroute.tasks.data.rows import divided, read_rows
from tests.tasks.made import SMALL

GRID = (  # no vocabulary: SMALL[:-2]
    "--task.kind image --model.causal false --model.block 4 --model.sub_block 2 --model.window 2 "
    "--model.top_k 1 --model.global_mode routed --task.image.patch 2 --data.context 128 "
    "--task.image.learned_places true"
).split()
ARRAYS = ("--task.columns", "{image: x, label: y}")


def images(count: int, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Noise of 9 x 8 pixels with a bright corner; which corner is the class."""
    draw = np.random.default_rng(seed)
    x = draw.integers(0, 60, (count, 9, 8), dtype=np.uint8)
    y = draw.integers(0, 4, count)
    for image, corner in zip(x, y, strict=True):
        row, column = divmod(int(corner), 2)
        image[row * 5 : row * 5 + 4, column * 4 : column * 4 + 4] += 120
    return x, y


def write(folder: Path, count: int = 300, seed: int = 0) -> Path:
    x, y = images(count, seed)
    path = folder / f"images{seed}.npz"
    np.savez(path, x=x, y=y)
    return path


def run(data: Path, output: Path, *more: str) -> int:
    return main(["finetune", *SMALL[:-2], *GRID, "--data.path", str(data), "--output", str(output), *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    assert run(write(folder), folder / "run", *ARRAYS, "--train.epochs", "6") == 0
    return folder / "run"


@pytest.mark.slow
def test_regions_and_squares_tell_corners_apart(trained: Path) -> None:
    checkpoint = find_checkpoint(trained)
    assert checkpoint.metadata["score"]["value"] > 0.9
    config = ModelConfig.from_file(checkpoint.folder / "model.json")
    assert config.frontend is not None
    assert (config.frontend.grid, config.frontend.features) == ([5, 4], 4)  # 9 rows of pixels: filled up


def test_files_are_answered_and_the_bad_ones_say_why(trained: Path, tmp_path: Path) -> None:
    """Other modes are converted; damaged files and other sizes have no prediction."""
    x, y = images(4, seed=5)
    folder = tmp_path / "asked"
    folder.mkdir()
    Image.fromarray(x[0].astype(np.uint16) * 257).save(folder / "16bit.png")  # Pillow itself makes it white
    (folder / "notes.txt").write_text("what these are")
    (folder / "folder.jpg").mkdir()
    for number, mode in enumerate(("L", "RGB", "P", "RGBA")):
        Image.fromarray(x[number]).convert(mode).save(folder / f"{number}.png")
    Image.fromarray(x[0]).resize((20, 20)).save(folder / "4.png")
    whole = (folder / "0.png").read_bytes()
    (folder / "5.png").write_bytes(whole[: len(whole) // 2])
    (folder / "6.jpg").write_bytes(b"no image")
    output = tmp_path / "answers.jsonl"
    asked = ["predict", "--checkpoint", str(trained), "--input", str(folder), "--output", str(output)]
    assert main(asked) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["image"] for line in lines] == sorted(line["image"] for line in lines)
    wide = next(line for line in lines if line["image"] == "16bit.png")
    assert wide["prediction"] == str(y[0])
    lines.remove(wide)
    assert [line.get("prediction") for line in lines[:4]] == [str(label) for label in y]
    assert all(line.get("prediction") is None for line in lines[4:])
    said = [json.dumps(line) for line in lines[4:]]
    assert "of another size than 9 x 8" in said[0]
    assert "is damaged or cut short" in said[1]
    assert "is damaged or cut short" in said[2]


def test_arrays_that_are_asked_are_not_copied_into_the_answers(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    data = write(tmp_path, 12, seed=6)
    assert main(["predict", "--checkpoint", str(trained), "--input", str(data), "--output", str(output)]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 12
    assert all("x" not in line and line["y"] in range(4) for line in lines)


def test_integers_answer_as_floats_do(trained: Path, tmp_path: Path) -> None:
    data = write(tmp_path, 100, seed=7)
    small, answers = tmp_path / "small", {}
    assert main(["quantize", "--checkpoint", str(trained), "--output", str(small)]) == 0
    for name, checkpoint in (("float", trained), ("int8", small)):
        output = tmp_path / f"{name}.jsonl"
        asked = ["predict", "--checkpoint", str(checkpoint), "--input", str(data), "--output", str(output)]
        assert main(asked) == 0
        answers[name] = [json.loads(line)["prediction"] for line in output.read_text().splitlines()]
    assert sum(a == b for a, b in zip(answers["float"], answers["int8"], strict=True)) >= 98


@pytest.mark.parametrize("command", ["export --format onnx", "prune --ffn_dim 16 --data none"])
def test_what_is_for_models_of_text_says_so(
    command: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--checkpoint", str(trained), "--output", str(tmp_path / "out")]
    assert main([*command.split(), *where]) == 2
    assert "this one reads patches" in capsys.readouterr().err


def test_folders_of_classes_and_paths_in_rows_are_read(tmp_path: Path) -> None:
    """A path in a file of rows begins in that file's folder; a share of damaged files is left out,
    counted."""
    x, y = images(60)
    for number in range(60):
        folder = tmp_path / "classes" / f"corner{y[number]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[number]).save(folder / f"{number}.png")
    steps = ("--train.max_steps", "4")
    assert run(tmp_path / "classes", tmp_path / "a", *steps) == 0
    moved = shutil.copytree(tmp_path / "classes", tmp_path / "moved")
    parts = [divided(read_rows(str(at), Problems()), 0.2, None)[1] for at in (moved, tmp_path / "classes")]
    assert [row for _, row in parts[0]] == [row for _, row in parts[1]] != []
    (tmp_path / "classes" / f"corner{y[0]}" / "0.png").write_bytes(b"")
    rows = [
        {"picture": f"corner{y[number]}/{number}.png", "label": f"corner{y[number]}"} for number in range(60)
    ]
    listed = tmp_path / "classes" / "rows.jsonl"
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ("--task.columns", "{image: picture}")
    assert run(listed, tmp_path / "b", *steps, *columns) == 2  # one of 60 is more than a hundredth
    assert run(listed, tmp_path / "b", *steps, *columns, "--data.max_bad_rows", "0.2") == 0
    assert find_checkpoint(tmp_path / "b").metadata["operation"] == "finetune"


def test_single_pixels_are_one_long_line(tmp_path: Path) -> None:
    data = write(tmp_path, 40)
    more = ("--task.image.patch", "1", "--model.block", "8", "--train.max_steps", "4")
    assert run(data, tmp_path / "run", *ARRAYS, *more) == 0
    config = ModelConfig.from_file(find_checkpoint(tmp_path / "run").folder / "model.json")
    assert config.frontend is not None
    assert config.frontend.kind == "values"
    assert config.grid is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model.block", "8"), "use block=4"),
        (("--model.causal", "true"), "causal=False"),
        (("--task.image.region_height", "7"), "region_height=7 is above"),
        (("--data.context", "16", "--data.max_length", "16"), "has 20 steps, more than the 16"),
        (("--task.image.channels", "2"), "give 1 (grey) or 3"),
        (("--task.columns", "{image: x, label: z}"), "has no column 'z'"),
        (("--model.vocab_size", "300"), "model.vocab_size has no meaning for a task of kind image"),
    ],
)
def test_what_does_not_fit_is_refused(
    more: tuple[str, ...],
    message: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    columns = () if "--task.columns" in more else ARRAYS
    assert run(write(tmp_path, 40), tmp_path / "run", *columns, "--train.max_steps", "4", *more) == 2
    assert message in capsys.readouterr().err + caplog.text


def test_files_that_are_no_arrays_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.npz"
    for content, message in (
        ({"x": np.zeros((3, 4, 4)), "y": np.zeros(2)}, "lengths {'x': 3, 'y': 2}"),
        ({"x": np.array([{}], dtype=object), "y": np.zeros(1)}, "cannot be read as arrays"),
        (None, "cannot be read as arrays"),
    ):
        if content is None:
            path.write_bytes(path.read_bytes()[:100])
        else:
            np.savez(path, **content)
        assert run(path, tmp_path / "run", *ARRAYS, "--train.max_steps", "4") == 2
        assert message in capsys.readouterr().err


def test_the_baseline_is_better_than_chance_and_needs_no_model() -> None:
    from dualroute.tasks.config import TaskConfig
    from dualroute.tasks.kind import Setting
    from dualroute.tasks.kinds.image import Images

    task = TaskConfig("image", {"image": "x", "label": "y"})
    kind = Images(task, Setting(None, 96))  # type: ignore[arg-type]
    rows = [[{"x": a, "y": b.item()} for a, b in zip(*images(60, seed), strict=True)] for seed in (0, 1)]
    kind.fit(rows[0])
    answers = kind.baselines()["nearest mean image"](rows[0], rows[1])
    assert kind.score([kind.target(row) for row in rows[1]], answers)["accuracy"] > 0.9
