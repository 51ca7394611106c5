"""``dualroute report``: one page on a run, for the person who started it.

Reads what a run left in its folder (``config.yaml``, ``metrics.jsonl``, the newest checkpoint) and the
manifest of its data; prints a page and writes it to ``report.md``.  Nothing is measured again, except that
the newest checkpoint writes a sample.  A checkpoint that is damaged is named, and the rest is reported.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markdown import Markdown

from dualroute.data.manifest import MANIFEST_FILE, Manifest
from dualroute.data.mixture.config import SourceConfig
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError, one_line, printable
from dualroute.files import write_bytes_atomically
from dualroute.model import DualRoutingTransformer, SamplingConfig, generate
from dualroute.model.checkpoint.format import (
    TOKENIZER,
    Checkpoint,
    find_checkpoint,
    load_model,
    scan_checkpoints,
)
from dualroute.model.checkpoint.lineage import total_tokens
from dualroute.paths import is_remote
from dualroute.training.monitoring.config import ReportConfig
from dualroute.training.monitoring.metrics_log import read_metrics
from dualroute.training.monitoring.mixture_record import read_stages


def report(config: ReportConfig) -> None:
    """Print the report of a run and write it to ``report.md`` in its folder.

    Raises:
        UserError: The folder is not a run that got as far as its first checkpoint.
    """
    run = Path(config.run)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml")
    text = _page(run, _corpora(run, _data_of(run / "config.yaml")), config)
    write_bytes_atomically(run / "report.md", text.encode())
    Console().print(Markdown(text))


def _data_of(path: Path) -> dict[str, str]:
    """Names and folders, or addresses, of the shards that a run's config.yaml names; one set has no name.

    Raises:
        UserError: The file cannot be read, or names none.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
        if sources := [SourceConfig(**source) for source in data.get("sources") or []]:
            return {source.called: source.path.replace("$$", "$") for source in sources}
        folder = data["path"]
        if not isinstance(folder, str):
            raise TypeError("data.path is no text")
    except (
        *(UserError, OSError, ValueError, TypeError, KeyError, AttributeError),
        yaml.YAMLError,
        RecursionError,
    ) as error:
        raise UserError(f"{path} is damaged ({one_line(str(error))}): it should name data.path") from error
    return {"": folder.replace("$$", "$")}  # as dualroute.paths writes it


def _corpora(run: Path, folders: dict[str, str]) -> list[tuple[str, str]]:
    """Lines about the data, with each source's share in every stage of a mixture."""
    lines = []
    for name, folder in folders.items():
        lines += [(f"{label}, {name}" if name else label, text) for label, text in _corpus(folder)]
    for stage in read_stages(run):
        shares = ", ".join(f"{name} {share:.1%}" for name, share in stage.get("weights", {}).items())
        lines.append((f"mixture from token {stage.get('from_tokens', 0):,}", shares))
    return lines


def _corpus(folder: str) -> list[tuple[str, str]]:
    """Lines about the data; where a run was moved without them, that they are not there."""
    if not is_remote(folder) and not (Path(folder) / MANIFEST_FILE).is_file():
        return [("corpus", f"the shards are no longer in `{folder}`")]
    try:
        manifest = Manifest.load(folder)
    except UserError as error:
        if not is_remote(folder):
            raise
        return [("corpus", f"the shards cannot be reached: {error}")]
    options = manifest.preparation.get("options", {})
    tokens = f"{manifest.split('train').tokens:,} (vocabulary {manifest.tokenizer.vocab_size:,})"
    text = f"{options.get('corpus', '?')}: {manifest.split('train').bytes / 1e6:.1f} MB of text"
    return [("corpus", text), ("tokens in it", tokens)]


def _newest(run: Path) -> tuple[Checkpoint | None, DualRoutingTransformer | None, list[str]]:
    """The newest checkpoint of a run that can be read, its model, and what is wrong with newer ones.

    Raises:
        UserError: There is none, and none that is damaged either.
    """
    scan = scan_checkpoints(run / "checkpoints")
    problems = {path.name: str(error) for path, error in scan.damaged.items()}
    for checkpoint in reversed(scan.finished):
        try:
            model = load_model(checkpoint)
        except UserError as error:
            problems[checkpoint.folder.name] = str(error)
            continue
        newer = [problem for name, problem in sorted(problems.items()) if name > checkpoint.folder.name]
        return checkpoint, model, newer
    if not problems:
        find_checkpoint(run)  # says what is missing
    return None, None, [problem for _, problem in sorted(problems.items())]


def _page(run: Path, corpora: list[tuple[str, str]], config: ReportConfig) -> str:
    train = read_metrics(run / "metrics.jsonl", "train")
    validation = read_metrics(run / "metrics.jsonl", "validation")
    if not train or not validation:
        raise UserError(f"{run / 'metrics.jsonl'} has no training or no validation in it yet: train longer")
    first, last = validation[0], validation[-1]
    checkpoint, model, problems = _newest(run)
    of_checkpoint, sample = [], "(there is no checkpoint that could write one)"
    if checkpoint is not None and model is not None:
        of_checkpoint = [
            (
                "model",
                f"{model.num_parameters():,} parameters, {model.num_parameters(embeddings=False):,} without "
                f"embeddings; attention {model.config.attention}",
            ),
            ("trained", _trained(checkpoint)),
        ]
        if model.task_head is not None:
            sample = "(a model with a task's head writes no text)"
        elif model.config.causal:
            sample = _sample(checkpoint, model, config)
        else:
            sample = "(the model sees both sides of each token: it continues no text)"
    rows = [
        *corpora,
        *of_checkpoint,
        (
            "validation loss",
            f"{first['val/loss']:.3f} at step {first['step']} → "
            f"{last['val/loss']:.3f} at step {last['step']}",
        ),
        *_figures(first, last),
        ("speed", f"{statistics.median(m['speed/tokens_per_second'] for m in train):,.0f} tokens/s (median)"),
        *(("damaged checkpoint", problem) for problem in problems),
        ("newest checkpoint", f"`{checkpoint.folder}`" if checkpoint else "none that can be read"),
        (
            "TensorBoard",
            f"`tensorboard --logdir {run / 'tensorboard'}`, then http://localhost:6006/#custom_scalars",
        ),
    ]
    if model is None or model.config.causal:
        rows.append(("more text", f'`dualroute generate --checkpoint {run} --prompt "…"`'))
    table = "\n".join(f"| {name} | {printable(value)} |" for name, value in rows)
    return f"# {run.name}\n\n| | |\n|---|---|\n{table}\n\n## A sample\n\n```\n{sample}\n```\n"


def _figures(first: dict[str, Any], last: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured at validations besides the loss: bits per byte of text, or a task's metrics."""
    names = [name for name in last if name.startswith("val/") and name not in ("val/loss", "val/perplexity")]
    return [
        (name.removeprefix("val/").replace("_", " "), f"{first[name]:.3f} → {last[name]:.3f}")
        for name in names
        if name in first
    ]


def _trained(checkpoint: Checkpoint) -> str:
    own, total = int(checkpoint.metadata.get("tokens", 0)), total_tokens(checkpoint.metadata)
    with_others = f" ({total:,} with the trainings it began with)" if total != own else ""
    return f"{checkpoint.step} steps, {own:,} tokens{with_others}"


def _sample(checkpoint: Checkpoint, model: DualRoutingTransformer, config: ReportConfig) -> str:
    tokenizer = Tokenizer(checkpoint.folder / TOKENIZER)
    ids = tokenizer.encode(config.prompt, bos=True)
    sampling = SamplingConfig(max_new_tokens=config.sample_tokens)
    return tokenizer.decode(ids + list(generate(model.float(), ids, sampling, tokenizer.eos_ids)))
