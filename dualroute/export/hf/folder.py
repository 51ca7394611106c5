"""A folder that transformers loads, for who has no dualroute.

    model.safetensors, config.json, generation_config.json    weights and settings
    tokenizer.json (or a class), tokenizer.model              the tokenizer, in both forms
    modeling_dualroute.py, dualroute_*.py, …                  the model's own source, see `bundle.py`; not
                                                              where a class of transformers computes the same
    README.md                                                 a model card with what was measured

In: a loaded checkpoint and a folder that is not published yet.  Here: all of these are written, then the
    folder is loaded in another process that cannot import this package, and its logits, token ids and greedy
    texts are compared with ours.

Weights are written under the names of this package with "model." in front, heads under those of transformers'
own models (:func:`named_weights`), nothing transposed or split, so going back is as easy; those of a model
that transformers has a class for (`transformers_layout.py`) under the names there.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from dualroute.attention.backend import plain_torch
from dualroute.errors import UserError
from dualroute.evaluate.load import Loaded
from dualroute.export import parity
from dualroute.export.hf import check_folder, transformers_layout
from dualroute.export.hf.bundle import bundle
from dualroute.export.hf.media import Medium
from dualroute.export.hf.tokenizer_files import end_of, marked_texts, trial_texts, write_tokenizer
from dualroute.model import DualRoutingTransformer, ModelConfig, SamplingConfig, generate
from dualroute.model.checkpoint.folder import TASK
from dualroute.model.checkpoint.weights_file import write_tensors
from dualroute.model.foreign.own_export import LABELS

TOLERANCE = 1e-5
OTHERS_TOLERANCE = 2e-5  # of another program's logits, as a share of the largest
MODEL_CODE, TOKENIZER_CODE = "modeling_dualroute.py", "tokenization_dualroute.py"
NEW_TOKENS = 24
ROOTS = [f"dualroute.export.hf.{name}_dualroute" for name in ("configuration", "modeling", "heads")]
MEDIA = "dualroute.export.hf.media_dualroute"


def write(loaded: Loaded, folder: Path, layout: str = "own") -> dict[str, Any]:
    """Write everything but the model card; returns what is worth knowing of it.

    Args:
        loaded: The model and its tokenizer.
        folder: Where to.
        layout: Whose class it is to be: own, transformers, or auto; see :class:`ExportConfig`.

    Raises:
        UserError: transformers has no class that computes the same.
    """
    reason = transformers_layout.why_not(loaded.model.config)
    if layout == "transformers" and reason:
        raise UserError(
            f"--layout transformers: no class of transformers computes this model ({reason}): use "
            f"--layout own"
        )
    shape = loaded.model.config
    purpose, medium = purpose_of(shape), Medium.of(loaded)
    source, code = "none", [] if medium is None else medium.write(folder)
    if shape.reads_text:
        source, code = write_tokenizer(
            loaded.tokenizer, folder, ends=purpose in HEADS, masks=purpose == "MaskedLM"
        )
    if layout == "own" or reason:
        write_tensors(folder / "model.safetensors", named_weights(loaded.model))
        media = [] if shape.reads_text else [MEDIA]
        code += bundle([*ROOTS, *media], folder)
        config = config_of(loaded, medium)
    else:
        write_tensors(folder / "model.safetensors", transformers_layout.named_weights(loaded.model))
        config = {**transformers_layout.config_fields(loaded.model.config), **_common(loaded)}
    _write_json(folder / "config.json", config)
    write_task(loaded, folder)
    specials = {name: value for name, value in config.items() if name.endswith("_token_id")}
    if purpose == "CausalLM":
        _write_json(folder / "generation_config.json", {"do_sample": False, **specials})
    return {"class": config["architectures"][0], "tokenizer": source, "source_files": sorted(set(code))}


#: (what enters, kind of `model.task_head`) → what transformers calls such a model
TASKS = {
    ("ids", "sequence"): "SequenceClassification",
    ("ids", "number"): "SequenceClassification",
    ("ids", "token"): "TokenClassification",
    ("ids", "span"): "QuestionAnswering",
    ("ids", "item"): "NextItem",
    ("patches", "sequence"): "ImageClassification",
    ("values", "sequence"): "ImageClassification",
    ("frames", "sequence"): "AudioClassification",
    ("frames", "ctc"): "CTC",
}
#: what transformers calls a model of texts → the name of its head there
HEADS = {"SequenceClassification": "score", "TokenClassification": "score", "QuestionAnswering": "qa_outputs"}
#: models of what is no text, whose heads have one name, and the Auto class that loads each
OTHERS = {
    "ImageClassification": "AutoModelForImageClassification",
    "AudioClassification": "AutoModelForAudioClassification",
    "CTC": "AutoModelForCTC",
    "NextItem": "AutoModelForSequenceClassification",
}


def purpose_of(shape: ModelConfig) -> str:
    """What transformers calls a model of this shape: CausalLM, MaskedLM, or after its task.

    Raises:
        UserError: transformers has no such model.
    """
    head = shape.task_head
    if head is None and shape.frontend is None:
        return "CausalLM" if shape.causal else "MaskedLM"
    enters = "ids" if shape.frontend is None else shape.frontend.kind
    leaves = "the next token" if head is None else head.kind
    if (enters, leaves) not in TASKS:
        known = ", ".join(f"{a} → {b}" for a, b in TASKS)
        raise UserError(
            f"a model that makes {leaves} (model.task_head.kind) of {enters} (model.frontend.kind) has no "
            f"counterpart in transformers, as {known} have: use dualroute predict"
        )
    return TASKS[enters, leaves]


def auto_class(purpose: str) -> str:
    """The class of transformers that loads such a model."""
    return OTHERS.get(purpose, f"AutoModelFor{purpose}")


def named_weights(model: DualRoutingTransformer) -> dict[str, torch.Tensor]:
    """The parameters of ``model`` under the names that they have in an exported folder; a tied head once."""
    head = HEADS.get(purpose_of(model.config), "score")
    named: dict[str, torch.Tensor] = {}
    for name, value in model.named_parameters():
        if name == "head.weight":
            named["lm_head.weight"] = value
        elif name.startswith("task_head.project."):
            named[name.replace("task_head.project", head)] = value
        else:
            named[f"model.{name}"] = value
    return named


def _classes(shape: ModelConfig) -> dict[str, str]:
    """auto_map of config.json: what the folder may be loaded for; weights of another head are left unread."""
    purpose = purpose_of(shape)
    modules = {
        "CausalLM": "modeling_dualroute",
        **dict.fromkeys(("MaskedLM", *HEADS), "heads_dualroute"),
        **dict.fromkeys(OTHERS, "media_dualroute"),
    }
    return {
        "AutoConfig": "configuration_dualroute.DualRoutingConfig",
        "AutoModel": "modeling_dualroute.DualRoutingModel",
        **{
            auto_class(name): f"{modules[name]}.DualRoutingFor{name}"
            for name in [purpose, *(HEADS if shape.reads_text else [])]
        },
    }


def _labels(shape: ModelConfig) -> dict[str, Any]:
    """What config.json says of a task's outputs."""
    head = shape.task_head
    if head is None or head.kind == "span":
        return {}
    if head.kind == "number":
        return {"num_labels": 1, "problem_type": "regression"}
    names = {
        "id2label": dict(enumerate(head.labels)),
        "label2id": {name: i for i, name in enumerate(head.labels)},
    }
    if head.kind == "ctc":
        return {"num_labels": len(head.labels), "ctc_loss_reduction": "mean"}
    single = head.kind in ("sequence", "item")
    return names | ({"problem_type": "single_label_classification"} if single else {})


def config_of(loaded: Loaded, medium: Medium | None = None) -> dict[str, Any]:
    """config.json."""
    shape = loaded.model.config
    return {
        "architectures": [f"DualRoutingFor{purpose_of(shape)}"],
        "model_type": "dualroute",
        "auto_map": _classes(shape),
        "dualroute": shape.to_dict(),
        "vocab_size": shape.vocab_size,
        **_common(loaded),
        **_labels(shape),
        **({} if medium is None else medium.config_fields()),
    }


def _common(loaded: Loaded) -> dict[str, Any]:
    """What config.json says whoever's class it is: dtype and special ids."""
    tokenizer, ends = loaded.tokenizer, list(loaded.tokenizer.eos_ids)
    said: dict[str, Any] = {"dtype": str(loaded.model.embedding.weight.dtype).removeprefix("torch.")}
    if not loaded.model.config.reads_text:  # the tokenizer is one of label names
        return said
    for name, number in (("bos_token_id", tokenizer.bos_id), ("pad_token_id", tokenizer.pad_id)):
        if number >= 0:
            said[name] = number
    if ends:
        said["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return said


def write_task(loaded: Loaded, folder: Path) -> None:
    """What `dualroute convert` makes a checkpoint of a task of again: task.json without the places of the
    data, and for models that read no text the tokenizer of the label names."""
    if loaded.model.config.task_head is None:
        return
    for content in loaded.checkpoint.task_file().values():
        said = json.loads(content)
        _write_json(folder / TASK, {name: value for name, value in said.items() if name != "data"})
    if not loaded.model.config.reads_text:
        shutil.copyfile(loaded.tokenizer.path, folder / LABELS)


def verify(loaded: Loaded, folder: Path, samples: list[str]) -> dict[str, Any]:
    """Load ``folder`` in a process without dualroute and compare it with ``loaded``.

    Raises:
        UserError: It cannot be loaded, or gives other logits, ids or texts; the message holds the figures.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    own = (folder / MODEL_CODE).is_file()
    if not own:  # another program: it rounds elsewhere, which float32 does not let grow
        model = copy.deepcopy(model).float()
    purpose = purpose_of(model.config)
    prompts = _prompts(loaded) if purpose == "CausalLM" else []
    greedy = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=0)
    medium = Medium.of(loaded)
    reads_text = model.config.reads_text
    with plain_torch():  # as in the folder: two blocks may score the same but for rounding
        trials = [] if medium is not None else list(parity.trials(model))
        media = None if medium is None else medium.trials(model)
        expected = {
            "threads": torch.get_num_threads(),
            "dtype": "auto" if own else "float32",
            "own_model": own,
            "own_tokenizer": (folder / TOKENIZER_CODE).is_file(),
            "purpose": purpose,
            "auto_class": auto_class(purpose),
            "reads_text": reads_text,
            "media": media,
            "end": [end_of(tokenizer)] if purpose in HEADS and end_of(tokenizer) >= 0 else [],
            "logits": trials,
            "texts": [(text, tokenizer.encode(text)) for text in trial_texts(tokenizer, samples)]
            if reads_text
            else [],
            "marked": marked_texts(tokenizer) if reads_text else [],
            "prompts": prompts,
            "continuations": [
                list(generate(model, prompt, greedy, tokenizer.eos_ids or None)) for prompt in prompts
            ],
        }
    found = run_check(folder, expected)
    largest = max(found["logits"].values())
    size = max((float(logits.abs().max()) for _, _, logits in trials), default=1.0)
    tolerance = TOLERANCE if own else OTHERS_TOLERANCE * max(1.0, size)
    if not largest <= tolerance:
        raise UserError(
            f"the exported model's logits are off by {found['logits']} (by length): not published"
        )
    if found["texts_differing"]:
        raise UserError(
            f"the exported tokenizer gives other ids for {len(found['texts_differing'])} of {found['texts']} "
            f"texts, {found['texts_differing'][0]!r} among them: not published"
        )
    if not all(found["generation"].values()):
        raise UserError(f"greedy texts of the exported model differ ({found['generation']}): not published")
    del found["texts_differing"]
    return {**found, "tolerance": tolerance, "new_tokens": NEW_TOKENS}


def run_check(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """What :mod:`dualroute.export.hf.check_folder` says, run by a Python that finds no dualroute.

    Raises:
        UserError: It failed; the message is its last line.
    """
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch, "expected.pt"), Path(scratch, "result.json")
        torch.save(expected, question)
        modules = str(Path(scratch, "modules"))  # where transformers copies the folder's code to
        environment = {**os.environ, **OFFLINE, "HF_MODULES_CACHE": modules, "CUDA_VISIBLE_DEVICES": ""}
        script = check_folder.__file__
        command = [sys.executable, "-I", str(script), str(folder.resolve()), str(question), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise UserError(f"the exported folder cannot be loaded by transformers ({last}): not published")
        return json.loads(answer.read_text(encoding="utf-8"))


#: Nothing here ever asks the network for anything.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def _prompts(loaded: Loaded) -> list[list[int]]:
    """Two prompts of unequal length; the longer one is routed where the context allows it."""
    config = loaded.model.config
    room = config.max_context - NEW_TOKENS
    if room < 1:
        return [[max(loaded.tokenizer.bos_id, 0)]]
    long = min(parity.lengths(config)[-1], room)
    ids = parity.trial_ids(config, long, batch=1)[0].tolist()
    return [ids[: min(5, room)], ids] if long > 5 else [ids]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
