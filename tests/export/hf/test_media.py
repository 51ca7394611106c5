"""Folders of models of images, recordings and items: loaded and asked by who has no dualroute."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("PIL", reason="Pillow is not installed")

from dualroute.cli import main  # noqa: E402
from dualroute.errors import UserError  # noqa: E402
from dualroute.evaluate.load import load  # noqa: E402
from dualroute.export import model_card  # noqa: E402
from dualroute.export.config import ExportConfig  # noqa: E402
from dualroute.export.hf import check_folder  # noqa: E402
from dualroute.export.hf import folder as huggingface  # noqa: E402
from dualroute.export.quality import measure  # noqa: E402
from dualroute.model import ModelConfig  # noqa: E402
from dualroute.model.checkpoint.folder import TASK  # noqa: E402
from dualroute.model.checkpoint.format import save_model  # noqa: E402
from dualroute.tasks.config import AudioConfig, ImageConfig, TaskConfig  # noqa: E402
from dualroute.tasks.description import describe_task, task_of  # noqa: E402
from dualroute.tasks.kind import Setting, find_kind  # noqa: E402
from tests.export.conftest import TINY, tiny_model  # noqa: E402

RATE, MELS = 4000, 6
AUDIO = AudioConfig(RATE, MELS, 80, 160, 2)
NOISE = np.random.default_rng(1)
PICTURE = NOISE.integers(0, 256, (9, 8, 3), dtype=np.uint8)
SOUND = NOISE.standard_normal(3000).astype(np.float32)
SAID = {"step": 1, "score": {"name": "accuracy", "value": 0.75, "higher_is_better": True}}
#: kind → what is configured, a training row, what the model has besides
KINDS = {
    "image": (
        TaskConfig("image", image=ImageConfig(9, 8, 3, patch=2, learned_places=True)),
        [{"image": PICTURE, "label": name} for name in ("cat", "dog", "cow")],
        {"causal": False, "block": 4, "head_dim": 8},
    ),
    "pixels": (
        TaskConfig("image", image=ImageConfig(5, 4, 1, patch=1, resize=True)),
        [{"image": PICTURE, "label": name} for name in ("a", "b")],
        {},
    ),
    "speech": (
        TaskConfig("speech", audio=AUDIO),
        [{"audio": SOUND, "label": name} for name in ("yes", "no")],
        {"causal": False},
    ),
    "recognition": (
        TaskConfig("recognition", audio=AUDIO),
        [{"audio": SOUND, "text": "a cab"}],
        {"causal": False},
    ),
    "item": (TaskConfig("item"), [{"items": ["film", "song", "book", "play"]}], {}),
}
CLASSES = {
    "image": "ImageClassification",
    "pixels": "ImageClassification",
    "speech": "AudioClassification",
    "recognition": "CTC",
    "item": "NextItem",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_dataset):
    """Export each kind once: compared as the command does, but in this process."""
    made = tmp_path_factory.mktemp("media")
    done: dict[str, tuple] = {}

    def run(name):
        if name not in done:
            task, rows, shape = KINDS[name]
            kind = find_kind(task.kind)(task, Setting(None, 64, shape.get("causal", True)))
            kind.fit(rows)
            head, frontend = kind.head(), kind.frontend()
            options = {**shape, "task_head": head, "frontend": frontend}
            model = tiny_model(kind.num_ids() or 320, **options)
            extra = {TASK: describe_task(kind, {})}
            at = save_model(model, made / f"{name}-c", tiny_dataset / "tokenizer.model", SAID, extra)
            loaded, folder = load(at.folder, "cpu", "float32"), made / name
            folder.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(huggingface, "run_check", lambda at, said: check_folder.check(str(at), said))
                config = ExportConfig(str(at.folder), "hf", str(folder))
                figures = model_card.write_export(config, loaded, folder, measure(config, loaded))
                done[name] = loaded, folder, figures["parity"], kind
        return done[name]

    return run


@pytest.mark.parametrize("name", KINDS)
def test_the_folder_gives_what_the_model_gives(name, folders):
    """Alone and in batches that are filled up, from raw pixels and samples."""
    _, folder, figures, kind = folders(name)
    assert figures["class"] == f"DualRoutingFor{CLASSES[name]}"
    assert max(figures["logits"].values()) <= huggingface.TOLERANCE
    card = (folder / "README.md").read_text()
    assert "| accuracy on validation data, by the training run | 0.7500 |" in card
    assert ("rank(" if name == "item" else f'pipeline("{card.split("pipeline_tag: ")[1].split()[0]}"') in card
    config = json.loads((folder / "config.json").read_text())
    if name != "recognition":
        assert list(config["id2label"].values()) == kind.labels


BARE = """
import json, runpy, sys
sys.meta_path.insert(0, runpy.run_path(sys.argv[1])["_Absent"]("dualroute", "data_prep"))
import numpy as np, transformers
from PIL import Image
transformers.logging.set_verbosity_error()
here, trust = sys.argv[2], {"trust_remote_code": True}
sound = np.load(f"{here}/sound.npy")
image = transformers.pipeline("image-classification", f"{here}/image", **trust)
speech = transformers.pipeline("audio-classification", f"{here}/speech", **trust)
said = transformers.pipeline("automatic-speech-recognition", f"{here}/recognition", **trust)
items = transformers.AutoModelForSequenceClassification.from_pretrained(f"{here}/item", **trust)
print(json.dumps({
    "image": [image(f"{here}/picture.png")[0]["label"], image([Image.open(f"{here}/picture.png")])[0][0]["label"]],
    "speech": speech({"array": sound, "sampling_rate": 4000})[0]["label"],
    "recognition": [said(sound.copy())["text"], said([sound.copy(), sound[:999]], batch_size=2)[0]["text"]],
    "item": items.rank([["song", "nobody's"], ["film", "book", "song"]], best=3),
}))
"""  # noqa: E501


@pytest.mark.slow
def test_pipelines_answer_as_predict_does_without_the_package(folders, tmp_path):
    from PIL import Image

    answers = {}
    for name in ("image", "speech", "recognition", "item"):
        loaded, folder, _, kind = folders(name)
        (tmp_path / name).symlink_to(folder)
        row = {"image": PICTURE, "audio": SOUND, "items": ["song", "nobody's"]}
        (example,) = kind.encode(row, with_target=False)
        key = "input_ids" if name == "item" else "inputs"
        with torch.no_grad():
            given = torch.from_numpy(example.fields[key])[None]
            outputs = loaded.model(given.long() if name == "item" else given)[0]
        outputs = outputs[torch.from_numpy(example.fields["outputs"])].numpy()
        found = kind.reduce(outputs, example)
        answers[name] = kind.decode({}, [type("P", (), {"output": found, "example": example})])
    Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    np.save(tmp_path / "sound.npy", SOUND)
    done = subprocess.run(
        [sys.executable, "-I", "-c", BARE, check_folder.__file__, str(tmp_path)],
        env={**os.environ, **huggingface.OFFLINE},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["image"] == [answers["image"]["prediction"]] * 2
    assert told["speech"] == answers["speech"]["prediction"]
    assert told["recognition"] == [answers["recognition"]["prediction"]] * 2
    assert told["item"][0] == answers["item"]["best"]
    assert told["item"][1] == ["play"]  # what a user had is left out


def test_losses_are_those_of_the_task(folders):
    """A training elsewhere can go on: gradients reach the frontend."""
    for name, auto in (("image", "ImageClassification"), ("recognition", "CTC")):
        folder = folders(name)[1]
        model = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(folder, trust_remote_code=True)
        if name == "image":
            processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
            inputs = processor([PICTURE, PICTURE.transpose(2, 0, 1)], return_tensors="pt")
            assert torch.equal(*inputs["pixel_values"])
            out = model(**inputs, labels=torch.tensor([0, 2]))
            wanted = torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 2]))
        else:
            auto = transformers.AutoFeatureExtractor
            processor = auto.from_pretrained(folder, trust_remote_code=True)
            inputs = processor([SOUND, SOUND[:1500]], sampling_rate=RATE, return_tensors="pt")
            labels = torch.tensor([[1, 2, 1], [2, -100, -100]])
            out = model(**inputs, labels=labels)
            single = [
                torch.nn.functional.ctc_loss(
                    model(**processor(sound, return_tensors="pt")).logits[0].log_softmax(-1), row[row > 0],
                    steps, torch.tensor(int((row > 0).sum())), reduction="sum",
                ) / (row > 0).sum()
                for sound, row, steps in zip(
                    [SOUND, SOUND[:1500]], labels, inputs["attention_mask"].sum(1), strict=True
                )
            ]  # fmt: skip
            wanted = torch.stack(single).mean()
        torch.testing.assert_close(out.loss, wanted)
        out.loss.backward()
        assert model.model.embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["image", "recognition", "item"])
def test_a_folder_comes_back(name, folders, tmp_path):
    loaded, folder, _, kind = folders(name)
    assert main(["convert", "--source", str(folder), "--output", str(tmp_path / "back")]) == 0
    back = load(tmp_path / "back", "cpu", "float32")
    assert all(map(torch.equal, back.model.parameters(), loaded.model.parameters()))
    again, _ = task_of(back.checkpoint, back.tokenizer, back.model.config.causal)
    assert (again.task, again.labels) == (kind.task, kind.labels)


def test_what_the_processors_cannot_read_is_refused(folders):
    images = transformers.AutoImageProcessor.from_pretrained(folders("image")[1], trust_remote_code=True)
    with pytest.raises(ValueError, match="20 x 20 pixels, and the model reads 9 x 8"):
        images(np.zeros((20, 20, 3), np.uint8))
    assert images(np.zeros((20, 20, 3), np.uint8), do_resize=True)["pixel_values"][0].shape == (3, 9, 8)
    sounds = transformers.AutoFeatureExtractor.from_pretrained(folders("speech")[1], trust_remote_code=True)
    with pytest.raises(ValueError, match="the model was trained at 4000"):
        sounds(SOUND, sampling_rate=16000)
    with pytest.raises(ValueError, match="at least 160 samples"):
        sounds(SOUND[:100])
    model = transformers.AutoModel.from_pretrained(folders("image")[1], trust_remote_code=True)
    with pytest.raises(ValueError, match=r"pixel_values has shape \[1, 3, 8, 9\]: give \[batch, 3, 9, 8\]"):
        model(pixel_values=torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="reads pixel_values, and not input_ids"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_head": {"kind": "ctc", "labels": ["a"]}}, "a model that makes ctc .* of ids"),
        ({"frontend": {"kind": "frames", "features": 4}}, "makes the next token .* of frames"),
    ],
)
def test_what_transformers_has_no_model_for_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        huggingface.purpose_of(ModelConfig(**TINY, vocab_size=320, **options))
