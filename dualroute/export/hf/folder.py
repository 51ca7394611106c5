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
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dualroute.attention.backend import plain_torch
from dualroute.errors import UserError
from dualroute.evaluate.load import Loaded
from dualroute.export import parity
from dualroute.export.hf import check_folder, transformers_layout
from dualroute.export.hf.bundle import bundle
from dualroute.export.hf.tokenizer_files import end_of, marked_texts, trial_texts, write_tokenizer
from dualroute.model import DualRoutingTransformer, ModelConfig, SamplingConfig, generate
from dualroute.model.checkpoint.weights_file import write_tensors

TOLERANCE = 1e-5
OTHERS_TOLERANCE = 2e-5  # of another program's logits, as a share of the largest
MODEL_CODE, TOKENIZER_CODE = "modeling_dualroute.py", "tokenization_dualroute.py"
NEW_TOKENS = 24
ROOTS = [f"dualroute.export.hf.{name}_dualroute" for name in ("configuration", "modeling", "heads")]


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
    purpose = purpose_of(loaded.model.config)
    source, code = write_tokenizer(loaded.tokenizer, folder, ends=purpose in HEADS)
    if layout == "own" or reason:
        write_tensors(folder / "model.safetensors", named_weights(loaded.model))
        code += bundle(ROOTS, folder)
        config = config_of(loaded)
    else:
        write_tensors(folder / "model.safetensors", transformers_layout.named_weights(loaded.model))
        config = {**transformers_layout.config_fields(loaded.model.config), **_common(loaded)}
    _write_json(folder / "config.json", config)
    specials = {name: value for name, value in config.items() if name.endswith("_token_id")}
    if purpose == "CausalLM":
        _write_json(folder / "generation_config.json", {"do_sample": False, **specials})
    return {"class": config["architectures"][0], "tokenizer": source, "source_files": sorted(set(code))}


#: kind of `model.task_head` → what transformers calls such a model
TASKS = {
    "sequence": "SequenceClassification",
    "number": "SequenceClassification",
    "token": "TokenClassification",
    "span": "QuestionAnswering",
}
#: what transformers calls a model → the name of its head there
HEADS = {"SequenceClassification": "score", "TokenClassification": "score", "QuestionAnswering": "qa_outputs"}


def purpose_of(shape: ModelConfig) -> str:
    """What transformers calls a model of this shape: CausalLM, MaskedLM, or after its task.

    Raises:
        UserError: transformers has no such model.
    """
    head = shape.task_head
    if shape.frontend is not None:
        raise UserError(
            f"a model that reads {shape.frontend.kind} (model.frontend) is not exported yet: use dualroute "
            f"predict"
        )
    if head is None:
        return "CausalLM" if shape.causal else "MaskedLM"
    if head.kind not in TASKS:
        raise UserError(
            f"a model with model.task_head.kind {head.kind} has no counterpart in transformers, as "
            f"{', '.join(TASKS)} have: use dualroute predict"
        )
    return TASKS[head.kind]


def named_weights(model: DualRoutingTransformer) -> dict[str, torch.Tensor]:
    """The parameters of ``model`` under the names that they have in an exported folder; a tied head once."""
    head = HEADS.get(purpose_of(model.config), "")
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
    modules = {"CausalLM": "modeling_dualroute", **dict.fromkeys(("MaskedLM", *HEADS), "heads_dualroute")}
    return {
        "AutoConfig": "configuration_dualroute.DualRoutingConfig",
        "AutoModel": "modeling_dualroute.DualRoutingModel",
        **{f"AutoModelFor{name}": f"{modules[name]}.DualRoutingFor{name}" for name in {purpose: 0, **HEADS}},
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
    return names | ({"problem_type": "single_label_classification"} if head.kind == "sequence" else {})


def config_of(loaded: Loaded) -> dict[str, Any]:
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
    }


def _common(loaded: Loaded) -> dict[str, Any]:
    """What config.json says whoever's class it is: dtype and special ids."""
    tokenizer, ends = loaded.tokenizer, list(loaded.tokenizer.eos_ids)
    said: dict[str, Any] = {"dtype": str(loaded.model.embedding.weight.dtype).removeprefix("torch.")}
    for name, number in (("bos_token_id", tokenizer.bos_id), ("pad_token_id", tokenizer.pad_id)):
        if number >= 0:
            said[name] = number
    if ends:
        said["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return said


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
    with plain_torch():  # as in the folder: two blocks may score the same but for rounding
        trials = list(_trials(model))
        expected = {
            "threads": torch.get_num_threads(),
            "dtype": "auto" if own else "float32",
            "own_model": own,
            "own_tokenizer": (folder / TOKENIZER_CODE).is_file(),
            "purpose": purpose,
            "end": [end_of(tokenizer)] if purpose in HEADS and end_of(tokenizer) >= 0 else [],
            "logits": trials,
            "texts": [(text, tokenizer.encode(text)) for text in trial_texts(tokenizer, samples)],
            "marked": marked_texts(tokenizer),
            "prompts": prompts,
            "continuations": [
                list(generate(model, prompt, greedy, tokenizer.eos_ids or None)) for prompt in prompts
            ],
        }
    found = run_check(folder, expected)
    largest = max(found["logits"].values())
    size = max(float(logits.abs().max()) for _, _, logits in trials)
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


def _trials(model: DualRoutingTransformer) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(ids, places, outputs) of every length: logits, or what a task's head gives at these places."""
    head = model.config.task_head
    for ids, places, logits in parity.trials(model):
        if head is None:
            yield ids, places, logits
            continue
        with torch.no_grad():
            outputs = model(ids)
        if head.kind in ("sequence", "number"):  # one for a text; the mean stands at each of its tokens
            places = torch.tensor([ids.shape[1] - 1 if head.pooling == "last" else 0])
        yield ids, places, outputs[:, places]


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
