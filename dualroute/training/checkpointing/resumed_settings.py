"""What a run that is resumed with other settings does with each of them: obey, or refuse by name.

In: the settings that the checkpoint was written with (``settings`` in its ``checkpoint.json``) and those of
this start.  Here: :data:`RULES` decides every key; :func:`refuse_changes` names the ones that cannot change,
with both values, before anything is loaded; :func:`learning_rate_note` says where a change makes the learning
rate jump.  docs/training.md holds the same table, and a test compares the two with the fields of the classes.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from dualroute.errors import UserError
from dualroute.model.checkpoint.folder import WEIGHTS, Checkpoint, find_checkpoint
from dualroute.training.config import PretrainConfig, TrainConfig
from dualroute.training.finetuning.config import RULES as STRATEGY_RULES
from dualroute.training.optim_config import MuonConfig, OptimConfig
from dualroute.training.step.optim import learning_rate
from dualroute.training.step.token_count import TokenCount

#: obeyed: the new value holds from the first step on.  refused: the run does not start with another value.
#: compared: what the key names may lie elsewhere, but must be the same.
Rule = Literal["obeyed", "refused", "compared"]

#: By key, or by section where all its keys have one rule.
RULES: dict[str, Rule] = {
    "output": "obeyed",
    "seed": "refused",
    "resume": "obeyed",
    "init_from": "compared",
    "model": "refused",
    "data.path": "compared",
    "data.context": "refused",
    "data.num_workers": "obeyed",
    "data.val_tokens": "obeyed",
    "data.verify": "obeyed",
    "data.sources": "compared",
    "data.stages": "compared",
    "data.temperature": "compared",
    "data.over_max_epochs": "obeyed",
    "data.packing": "refused",
    "data.shuffle_tokens": "refused",
    "data.fim_rate": "refused",
    "data.fim_spm_rate": "refused",
    "data.fim_tokens": "refused",
    "data.objective": "refused",
    "data.mask_share": "obeyed",
    "data.cache_dir": "obeyed",
    "data.cache_gib": "obeyed",
    "data.prefetch_shards": "obeyed",
    "data.fetch_timeout": "obeyed",
    "data.fetch_retries": "obeyed",
    "data.retry_seconds": "obeyed",
    "data.on_bad_data": "obeyed",
    "data.max_bad_windows": "obeyed",
    "train": "obeyed",
    "optim.name": "refused",
    "optim.lr": "obeyed",
    "optim.embedding_lr": "obeyed",
    "optim.head_lr": "obeyed",
    "optim.base_dim": "obeyed",
    **{f"optim.muon.{field.name}": "obeyed" for field in dataclasses.fields(MuonConfig)},
    "optim.betas": "obeyed",
    "optim.eps": "obeyed",
    "optim.weight_decay": "obeyed",
    "optim.decay_embeddings": "refused",
    "optim.warmup_steps": "obeyed",
    "optim.schedule": "obeyed",
    "optim.min_lr_ratio": "obeyed",
    "optim.decay_fraction": "obeyed",
    "optim.decay_shape": "obeyed",
    "optim.grad_clip": "obeyed",
    "optim.fused": "obeyed",
    **STRATEGY_RULES,
    "spike_guard": "obeyed",
    "checkpoint": "obeyed",
    "monitor": "obeyed",
    "parallel": "obeyed",
    "watchdog": "obeyed",
}


def settings_of(config: PretrainConfig) -> dict[str, Any]:
    """All settings as they stand in ``checkpoint.json``; the model has a file of its own there."""
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for name, value in settings.items() if name != "model"}


def refuse_changes(checkpoint: Checkpoint, config: PretrainConfig, data_fingerprint: str) -> None:
    """Compare a run's settings with those that the checkpoint was written with.

    One that was written before settings were kept is compared in its data and model alone.

    Raises:
        UserError: Naming all keys that cannot change, with both values.
    """
    saved, ours = _flat(checkpoint.metadata.get("settings")), _flat(settings_of(config))
    if "data.packing" in saved:  # of a checkpoint from before there was another order
        saved.setdefault("data.shuffle_tokens", None)
    rules = {**RULES, **getattr(config, "resume_rules", {})}
    changed = [
        f"{key} was {_shown(saved[key])} and is {_shown(ours[key])}"
        for key in ours
        if rules.get(key) == "refused" and key in saved and saved[key] != ours[key]
    ]
    their_data = checkpoint.metadata.get("data_fingerprint", data_fingerprint)
    order = ("data.packing", "data.fim", "data.shuffle")  # which change it too
    packed = any(line.startswith(order) for line in changed)
    if their_data != data_fingerprint and not packed:
        changed.append(
            f"data.path was {saved.get('data.path', 'a folder')} with fingerprint {their_data} and is "
            f"{config.data.path} with {data_fingerprint}"
        )
    if "init_from" in saved and not _same_weights(checkpoint, saved["init_from"], config.init_from):
        changed.append(f"init_from was {saved['init_from']} and is {config.init_from}")
    if changed:
        raise UserError(
            f"{checkpoint.folder} cannot be resumed with other values of these: {'; '.join(changed)}; give "
            f"the old ones, or start a new run with another --output"
        )


def _same_weights(checkpoint: Checkpoint, theirs: str | None, ours: str | None) -> bool:
    """Whether both name the weights that the run began with; a folder that is gone is known by its path."""
    if theirs is None or ours is None:
        return theirs == ours
    if theirs == ours or os.path.realpath(theirs) == os.path.realpath(ours):
        return True
    lineage = checkpoint.metadata.get("lineage") or [{}]
    digest = lineage[-1].get("weights_sha256")
    try:
        found = find_checkpoint(Path(ours)).metadata["files"][WEIGHTS]["sha256"]
    except (UserError, KeyError, TypeError):
        return False
    return digest is not None and found == digest


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """{"data.path": …} of nested tables."""
    return dict(_leaves(settings, prefix)) if isinstance(settings, Mapping) else {}


def _leaves(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def learning_rate_note(checkpoint: Checkpoint, config: PretrainConfig, count: TokenCount) -> str | None:
    """A line where the learning rate jumps at the resume, because settings of its course have changed.

    Args:
        checkpoint: What is resumed.
        config: Of this start.
        count: Of this start.

    Returns:
        Null where it goes on as it would have, or where the checkpoint does not say how.
    """
    saved = checkpoint.metadata.get("settings")
    if not isinstance(saved, Mapping):
        return None
    try:
        train, optim = _known(TrainConfig, saved["train"]), _known(OptimConfig, saved["optim"])
        then = TokenCount.resumed(checkpoint, train.tokens_per_batch)
        last = min(checkpoint.step, then.total_steps(train))
        before = learning_rate(last, train, optim, then)
    except (KeyError, TypeError, UserError):
        return None  # of another version: it cannot be said
    after = learning_rate(checkpoint.step, config.train, config.optim, count)
    if abs(after - before) <= 0.01 * max(before, 1e-30):
        return None
    new, old = _flat(settings_of(config)), _flat(saved)
    keys = [
        key for key in new if key.startswith(("train.", "optim.")) and key in old and old[key] != new[key]
    ]
    text = (
        f"the learning rate goes from {before:.3g} to {after:.3g} at step {checkpoint.step + 1}, because "
        f"{', '.join(f'{key} was {_shown(old[key])} and is {_shown(new[key])}' for key in keys)}"
    )
    if after > before and optim.schedule != "constant" and last >= then.total_steps(train):
        text += (
            "; the run had been trained to the end of its schedule, and rising again costs part of what the "
            "fall has won (to extend a run, train it with optim.schedule wsd and resume from before its fall)"
        )
    return text


def _known(cls: type[Any], values: Mapping[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})
