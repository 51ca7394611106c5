"""A checkpoint on each source of a mixture, and on the mixture: ``dualroute evaluate --sources``.

In: folders of shards with their weights, or those that a run was trained on. Out: a score each, and that of
their mixture: the mean of the losses by weight, over text that is mixed so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dualroute.data.mixture.config import SourceConfig, check_mixture
from dualroute.errors import UserError
from dualroute.evaluate.config import EvaluateConfig
from dualroute.evaluate.load import Loaded, load_any
from dualroute.evaluate.perplexity import Score, context_of, evaluate_shards
from dualroute.files import write_bytes_atomically
from dualroute.model.steering import steer

Scores = dict[str, Score]


def sources_of(loaded: Loaded) -> list[SourceConfig]:
    """The sources that a checkpoint was trained on, with the weights of the stage that it has come to.

    Raises:
        UserError: It was trained on no mixture, or does not say on which.
    """
    metadata = loaded.checkpoint.metadata
    settings, mixture = metadata.get("settings"), metadata.get("mixture")
    data = settings.get("data") if isinstance(settings, dict) else None
    try:
        found = [SourceConfig(**source) for source in data["sources"]]  # type: ignore[index]
        stages, names = mixture["stages"], mixture["names"]  # type: ignore[index]
        consumed = int(metadata.get("samples_consumed", 0))
        turns = [stage["turns"] for stage in stages if stage["from_sample"] < max(consumed, 1)][-1]
        total = sum(turns.values())
        weights = {names[key]: count / total for key, count in turns.items()}
    except (KeyError, TypeError, ValueError, IndexError):
        found = []
    if not found:
        raise UserError(
            "give --data (a folder of shards), --sources (several, with weights) or --text (a file): "
            f"{loaded.checkpoint.folder} was trained on no mixture whose sources could be taken"
        )
    return [SourceConfig(source.path, weights.get(source.called, 0.0), source.name) for source in found]


def evaluate_sources(
    loaded: Loaded,
    sources: Sequence[SourceConfig],
    split: str,
    context: int,
    batch_size: int,
    max_tokens: int | None,
) -> tuple[Score, Scores]:
    """The score of the mixture, and of each source by name.

    Args:
        max_tokens: Of each source; None scores all.

    Raises:
        UserError: The sources contradict themselves, or one of them cannot be scored.
    """
    check_mixture(sources, [])
    scores = {
        source.called: evaluate_shards(loaded, source.path, split, context, batch_size, max_tokens)
        for source in sources
    }
    given = {source.called: source.weight for source in sources}
    weights = {
        name: float(scores[name].targets if weight is None else weight) for name, weight in given.items()
    }
    return mixed(scores, weights), scores


def mixed(scores: Mapping[str, Score], weights: Mapping[str, float]) -> Score:
    """What text that is mixed so would score, by its targets."""
    total = sum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    loss = sum(share * scores[name].loss for name, share in shares.items())
    targets = sum(score.targets for score in scores.values())
    density = sum(share * scores[name].bytes / scores[name].targets for name, share in shares.items())
    return Score(loss, targets, targets * density, next(iter(scores.values())).masked)


def table_of(mixture: Score, scores: Scores) -> Table:
    """One row a source, and the mixture."""
    next_token = mixture.masked is None
    table = Table(
        "source",
        "loss (nats/token)" if next_token else "masked loss (nats/token)",
        "perplexity" if next_token else "pseudo-perplexity",
        *(["bits per byte"] if next_token else []),
        "tokens scored",
    )
    for name, score in {**scores, "mixture": mixture}.items():
        density = [f"{score.bits_per_byte:.4f}"] if next_token else []
        if name == "mixture":
            table.add_section()
        table.add_row(name, f"{score.loss:.4f}", f"{score.perplexity:.2f}", *density, f"{score.targets:,}")
    return table


def figures_of(scores: Scores) -> dict[str, Any]:
    """For JSON."""
    return {
        name: {
            **asdict(score),
            "perplexity": score.perplexity,
            **({"bits_per_byte": score.bits_per_byte} if score.masked is None else {}),
        }
        for name, score in scores.items()
    }


def evaluate_command(config: EvaluateConfig) -> None:
    """``dualroute evaluate`` of a mixture: print the figures of each source, and write them where asked.

    Raises:
        UserError: Any of the inputs cannot be used, or the output cannot be written.
    """
    if config.output is not None and not Path(config.output).parent.is_dir():  # said now, not after the work
        raise UserError(f"--output {config.output}: there is no folder {Path(config.output).parent}: make it")
    loaded = load_any(config.checkpoint, config.device, config.dtype)
    sources = config.sources or sources_of(loaded)
    steer(loaded.model, config.scale or "")
    mixture, scores = evaluate_sources(
        loaded, sources, config.split, context_of(loaded, config), config.batch_size, config.max_tokens
    )
    Console().print(table_of(mixture, scores))
    if config.output is None:
        return
    by_name = figures_of({**scores, "mixture": mixture})
    figures = {**by_name.pop("mixture"), "sources": by_name, "evaluation": config.of_one_measure()}
    try:
        write_bytes_atomically(config.output, json.dumps(figures, indent=1).encode())
    except OSError as error:
        raise UserError(f"--output {config.output} cannot be written: {error.strerror or error}") from error
