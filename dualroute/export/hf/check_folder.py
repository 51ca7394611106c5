"""Loads an exported folder as a stranger does, and compares what it gives with what was expected.

Run as a script, in a process of its own: ``python -I check_folder.py FOLDER EXPECTED RESULT``.  In: a Hugging
Face folder, and the inputs and answers that `folder.py` saved.  Out: the differences as JSON.

``import dualroute`` fails in that process, by order.  A folder that needs the package it
was exported from is no export.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


class _Absent:
    """A finder that knows no package of these names, whatever is installed."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def check(folder: str, expected: dict[str, Any]) -> dict[str, Any]:
    """Differences between a folder and what is expected of it."""
    import torch
    import transformers

    torch.set_num_threads(expected["threads"])
    transformers.logging.set_verbosity_error()
    auto = getattr(transformers, expected["auto_class"])
    model = auto.from_pretrained(folder, trust_remote_code=expected["own_model"], dtype=expected["dtype"])
    model.eval()
    result: dict[str, Any] = {
        "transformers": transformers.__version__,
        "class": type(model).__name__,
        "logits": {},
        "texts": 0,
        "texts_differing": [],
        "generation": {},
    }
    if expected["media"] is not None:
        with torch.no_grad():
            result["logits"] = _of_media(folder, model, expected["media"])
    if expected["reads_text"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=expected["own_tokenizer"]
        )
        result["tokenizer_class"] = type(tokenizer).__name__
        result["texts"] = len(expected["texts"]) + len(expected["marked"])
        result["texts_differing"] = _differing(tokenizer, expected)
    elif expected["media"] is not None and expected["media"]["said"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        result["tokenizer_class"] = type(tokenizer).__name__
        said = expected["media"]["said"]
        result["texts"] = len(said)
        result["texts_differing"] = [text for best, text in said if tokenizer.decode(best) != text]
    with torch.no_grad():
        for ids, positions, logits in expected["logits"]:
            got = _outputs(model, expected["purpose"], ids, positions)
            difference = (got.double() - logits.double()).abs().max()
            result["logits"][str(ids.shape[1])] = float(difference)
    if expected["prompts"]:
        result["generation"] = _generate(model, expected["prompts"], expected["continuations"])
    return result


def _of_media(folder: str, model: Any, media: dict[str, Any]) -> dict[str, float]:
    """Differences of the outputs for images or recordings, each alone and all in one batch."""
    import transformers

    images = media["rate"] is None
    auto = transformers.AutoImageProcessor if images else transformers.AutoFeatureExtractor
    processor = auto.from_pretrained(folder, trust_remote_code=True)
    said = {} if images else {"sampling_rate": media["rate"]}
    raw = [value.numpy() for value in media["raw"]]
    found: dict[str, float] = {}
    for name, some in (("alone", [[number] for number in range(len(raw))]), ("together", [range(len(raw))])):
        for numbers in some:
            inputs = processor([raw[number] for number in numbers], return_tensors="pt", **said)
            logits = model(**inputs).logits
            for number, got in zip(numbers, logits, strict=True):
                right = media["outputs"][number]
                got = got[: len(right)] if right.ndim == 2 else got
                difference = float((got.double() - right.double()).abs().max())
                found[name] = max(found.get(name, 0.0), difference)
    return found


def _differing(tokenizer: Any, expected: dict[str, Any]) -> list[str]:
    """Beginnings of the texts that get other ids than they should."""
    bos = tokenizer.bos_token_id
    wrong = []
    as_text = {"split_special_tokens": True}  # as in training: a special token that a text spells is text
    for text, ids in expected["texts"]:
        whole = [*([] if bos is None else [bos]), *ids, *expected["end"]]
        if (
            tokenizer(text, **as_text).input_ids != whole
            or tokenizer(text, add_special_tokens=False, **as_text).input_ids != ids
        ):
            wrong.append(text[:80])
    for text, ids in expected["marked"]:  # as templates and trainers need it: the token itself
        if tokenizer(text, add_special_tokens=False).input_ids != ids:
            wrong.append(text[:80])
    return wrong


def _outputs(model: Any, purpose: str, ids: Any, places: Any) -> Any:
    """What leaves at some places of texts, (B, places, outputs); for a text as a whole there is one place."""
    import torch

    if purpose == "CausalLM":
        return model(input_ids=ids, logits_to_keep=places).logits
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids))  # else <pad> among them were padding
    if purpose in ("SequenceClassification", "NextItem"):
        return out.logits[:, None]
    if purpose == "QuestionAnswering":
        return torch.stack([out.start_logits, out.end_logits], -1)[:, places]
    return out.logits[:, places]


def _generate(model: Any, prompts: list[list[int]], wanted: list[list[int]]) -> dict[str, bool]:
    """Whether greedy search with the cache gives the continuations: one by one, and padded on the left."""
    import torch

    def run(batch: list[list[int]]) -> list[list[int]]:
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        new = max(map(len, wanted))
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
        return out[:, width:].tolist()

    alone = [run([prompt])[0] for prompt in prompts]
    together = run(prompts)
    return {
        name: all(row[: len(ids)] == ids for row, ids in zip(rows, wanted, strict=True))
        for name, rows in (("alone", alone), ("padded_batch", together))
    }


if __name__ == "__main__":
    folder, expected, result = sys.argv[1:]
    sys.meta_path.insert(0, _Absent("dualroute", "data_prep"))
    import torch

    found = check(folder, torch.load(expected, weights_only=True))
    Path(result).write_text(json.dumps(found), encoding="utf-8")
