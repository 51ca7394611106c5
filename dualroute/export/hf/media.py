"""What a folder of a model of images, recordings or items has instead of a tokenizer of texts.

In: a loaded checkpoint with its task.json.  Here: settings of the image processor or feature extractor, which
read what the training read; the characters of recognition as a tokenizer of transformers.  Out: these files,
and raw inputs with the outputs that are right for them, for `check_folder.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dualroute.errors import UserError
from dualroute.evaluate.load import Loaded
from dualroute.export.hf.bundle import bundle
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.tasks.config import AudioConfig, ImageConfig
from dualroute.tasks.description import task_of
from dualroute.tasks.kind import Kind
from dualroute.tasks.kinds.image import Images
from dualroute.tasks.kinds.recognition import Recognition
from dualroute.tasks.kinds.speech import Recordings

PROCESSOR = "preprocessor_config.json"
_PIXEL = 127.5
_TRIALS = 3
#: What stands for "no character" in the tokenizer of recognition.
_NONE = "<pad>"


@dataclass
class Medium:
    """What enters a model that reads no text.

    Attributes:
        kind: Of the task that it was trained for.
        name: Of what the processor gives.
    """

    kind: Kind
    name: str

    @classmethod
    def of(cls, loaded: Loaded) -> Medium | None:
        """That of a model with a frontend; null for ids.

        Raises:
            UserError: The task is one of a user's own, whose inputs nothing here can prepare.
        """
        shape = loaded.model.config
        if shape.frontend is None:
            return None
        kind, _ = task_of(loaded.checkpoint, loaded.tokenizer, shape.causal)
        if not isinstance(kind, Images | Recordings | Recognition):
            raise UserError(
                f"a model of kind {kind.name} reads {shape.frontend.kind} (model.frontend) that no processor "
                f"of an exported folder makes, as those of image, speech and recognition do: use dualroute "
                f"predict"
            )
        return cls(kind, "pixel_values" if isinstance(kind, Images) else "input_features")

    def write(self, folder: Path) -> list[str]:
        """Write the processor, and the tokenizer of recognition; returns the names of files that are code."""
        task = self.kind.task
        if isinstance(self.kind, Images):
            module, settings = "image_processing_dualroute", image_settings(task.image)
        else:
            module, settings = "feature_extraction_dualroute", audio_settings(task.audio)
        _write_json(folder / PROCESSOR, settings)
        if isinstance(self.kind, Recognition):
            write_characters(self.kind.labels, folder)
        return bundle([f"dualroute.export.hf.{module}"], folder)

    def config_fields(self) -> dict[str, Any]:
        """What config.json says of the inputs."""
        task = self.kind.task
        if isinstance(self.kind, Images):
            config = task.image
            return {
                "image_size": [config.height, config.width],
                "num_channels": config.channels,
                "patch_size": config.patch,
            }
        fields: dict[str, Any] = {"inputs_to_logits_ratio": task.audio.hop * task.audio.stack}
        if isinstance(self.kind, Recognition):
            fields["pad_token_id"] = 0
        return fields

    def trials(self, model: DualRoutingTransformer) -> dict[str, Any]:
        """Raw inputs, what the model's own reading of them gives, and what decoded outputs spell."""
        raw = self._raw_inputs(model.config)
        role = self.kind.media[0]
        outputs, said = [], []
        for value in raw:
            (example,) = self.kind.encode({self.kind.column(role): value}, with_target=False)
            steps = torch.from_numpy(example.fields["inputs"])[None]
            if steps.dtype == torch.uint8:  # as the processor has it, which rounds to float32 first
                steps = steps.float() / _PIXEL - 1
            with torch.no_grad():
                found = model(steps)[0]
            head = model.config.task_head
            assert head is not None
            if head.kind == "ctc":
                said.append(spelled(self.kind, found.argmax(-1).tolist()))
                outputs.append(found)
            else:  # the mean stands at each step
                outputs.append(found[0 if head.pooling == "first" else -1])
        return {
            "name": self.name,
            "raw": [torch.from_numpy(value) for value in raw],
            "rate": None if isinstance(self.kind, Images) else self.kind.task.audio.rate,
            "outputs": outputs,
            "said": said,
        }

    def _raw_inputs(self, shape: ModelConfig) -> list[Any]:
        draw = np.random.default_rng(0)
        if isinstance(self.kind, Images):
            config = self.kind.task.image
            size = (config.height, config.width, config.channels)
            return [draw.integers(0, 256, size, dtype=np.uint8) for _ in range(_TRIALS)]  # type: ignore[arg-type]
        audio = self.kind.task.audio
        longest = min(self.kind.setting.max_length, 2 * shape.block * (shape.top_k + 3))
        lengths = {1, max(1, longest // 3), longest}  # steps
        # a frame at each hop, the first in the middle of the first sample
        samples = [max(audio.frame, (length * audio.stack - 1) * audio.hop) for length in sorted(lengths)]
        return [draw.standard_normal(count).astype(np.float32) for count in samples]


def image_settings(config: ImageConfig) -> dict[str, Any]:
    """preprocessor_config.json of a model of images."""
    return {
        "image_processor_type": "DualRoutingImageProcessor",
        "auto_map": {"AutoImageProcessor": "image_processing_dualroute.DualRoutingImageProcessor"},
        "size": {"height": config.height, "width": config.width},
        "num_channels": config.channels,
        "do_resize": config.resize,
    }


def audio_settings(config: AudioConfig) -> dict[str, Any]:
    """preprocessor_config.json of a model of recordings."""
    return {
        "feature_extractor_type": "DualRoutingFeatureExtractor",
        "auto_map": {"AutoFeatureExtractor": "feature_extraction_dualroute.DualRoutingFeatureExtractor"},
        "feature_size": config.stack * config.mels,
        "sampling_rate": config.rate,
        "padding_value": 0.0,
        "num_mel_bins": config.mels,
        "hop_length": config.hop,
        "frame_length": config.frame,
        "stack": config.stack,
        "return_attention_mask": True,
    }


def write_characters(labels: list[str], folder: Path) -> None:
    """The characters of recognition as transformers' own tokenizer for CTC."""
    _write_json(folder / "vocab.json", {name or _NONE: number for number, name in enumerate(labels)})
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            "pad_token": _NONE,
            **dict.fromkeys(("unk_token", "bos_token", "eos_token")),
            "word_delimiter_token": " ",
            "clean_up_tokenization_spaces": False,
        },
    )


def spelled(kind: Kind, best: list[int]) -> tuple[list[int], str]:
    """The best output of each step, and the text that these spell."""
    from dualroute.tasks.kind import Part

    numbers = [number for number, _ in groupby(best) if number]
    return best, kind.decode({}, [Part(None, numbers)])["prediction"]  # type: ignore[arg-type]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
