"""A folder that transformers loads, for who has no dualroute.

    model.safetensors, config.json, generation_config.json    weights and settings
    tokenizer.json (or a class), tokenizer.model              the tokenizer, in both forms
    modeling_dualroute.py, dualroute_*.py, …                  the model's own source, see `bundle.py`; not
                                                              where a class of transformers computes the same
    README.md                                                 a model card with what was measured

In: a loaded checkpoint and a folder that is not published yet.  Here: all of these are written, then the
    folder is loaded in another process that cannot import this package, and its logits, token ids and greedy
    texts are compared with ours.

Weights are written under the names of this package with "model." in front, nothing transposed or split, so
going back is as easy; those of a model that transformers has a class for (`transformers_layout.py`) under the
names there.
"""

from __future__ import annotations

import copy
import json
import os
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
from dualroute.export.hf.tokenizer_files import marked_texts, trial_texts, write_tokenizer
from dualroute.model import SamplingConfig, generate
from dualroute.model.checkpoint.weights_file import write_tensors

TOLERANCE = 1e-5
OTHERS_TOLERANCE = 2e-5  # of another program's logits, as a share of the largest
MODEL_CODE, TOKENIZER_CODE = "modeling_dualroute.py", "tokenization_dualroute.py"
NEW_TOKENS = 24
ROOTS = ["dualroute.export.hf.configuration_dualroute", "dualroute.export.hf.modeling_dualroute"]


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
    source, code = write_tokenizer(loaded.tokenizer, folder)
    if layout == "own" or reason:
        parameters = {f"model.{name}": value for name, value in loaded.model.named_parameters()}
        write_tensors(folder / "model.safetensors", parameters)
        code += bundle(ROOTS, folder)
        config = config_of(loaded)
    else:
        write_tensors(folder / "model.safetensors", transformers_layout.named_weights(loaded.model))
        config = {**transformers_layout.config_fields(loaded.model.config), **_common(loaded)}
    _write_json(folder / "config.json", config)
    specials = {name: value for name, value in config.items() if name.endswith("_token_id")}
    _write_json(folder / "generation_config.json", {"do_sample": False, **specials})
    return {"class": config["architectures"][0], "tokenizer": source, "source_files": sorted(set(code))}


def config_of(loaded: Loaded) -> dict[str, Any]:
    """config.json."""
    shape = loaded.model.config
    return {
        "architectures": ["DualRoutingForCausalLM"],
        "model_type": "dualroute",
        "auto_map": {
            "AutoConfig": "configuration_dualroute.DualRoutingConfig",
            "AutoModelForCausalLM": "modeling_dualroute.DualRoutingForCausalLM",
        },
        "dualroute": shape.to_dict(),
        "vocab_size": shape.vocab_size,
        **_common(loaded),
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
    prompts = _prompts(loaded)
    greedy = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=0)
    with plain_torch():  # as in the folder: two blocks may score the same but for rounding
        trials = list(parity.trials(model))
        expected = {
            "threads": torch.get_num_threads(),
            "dtype": "auto" if own else "float32",
            "own_model": own,
            "own_tokenizer": (folder / TOKENIZER_CODE).is_file(),
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
