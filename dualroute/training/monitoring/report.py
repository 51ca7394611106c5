"""``dualroute report``: one page on a run, for the person who started it.

Reads what a run left in its folder (``config.yaml``, ``metrics.jsonl``, the newest checkpoint) and the
manifest of its data; prints a page and writes it to ``report.md``.  Nothing is measured again, except that
the newest checkpoint writes a sample.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markdown import Markdown

from dualroute.data.manifest import Manifest
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.files import write_bytes_atomically
from dualroute.model import SamplingConfig, generate
from dualroute.model.checkpoint_format import TOKENIZER, Checkpoint, find_checkpoint, load_model
from dualroute.model.lineage import total_tokens
from dualroute.settings import at_least, check_fields
from dualroute.training.monitoring.metrics_log import read_metrics


@dataclass
class ReportConfig:
    """Show what a run did.

    Args:
        run: The run folder.
        prompt: Beginning of the sample that the newest checkpoint writes.
        sample_tokens: Length of the sample.
    """

    run: str
    prompt: str = "The"
    sample_tokens: int = 120

    def __post_init__(self) -> None:
        check_fields(self, "", {"sample_tokens": at_least(1)}, may_be_empty=["prompt"])


def report(config: ReportConfig) -> None:
    """Print the report of a run and write it to ``report.md`` in its folder.

    Raises:
        UserError: The folder is not a run that got as far as its first checkpoint.
    """
    run = Path(config.run)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml")
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    checkpoint = find_checkpoint(run)
    text = _page(run, settings, checkpoint, _sample(checkpoint, config))
    write_bytes_atomically(run / "report.md", text.encode())
    Console().print(Markdown(text))


def _page(run: Path, settings: dict[str, Any], checkpoint: Checkpoint, sample: str) -> str:
    manifest = Manifest.load(settings["data"]["path"])
    train = read_metrics(run / "metrics.jsonl", "train")
    validation = read_metrics(run / "metrics.jsonl", "validation")
    if not train or not validation:
        raise UserError(f"{run / 'metrics.jsonl'} has no training or no validation in it yet: train longer")
    first, last = validation[0], validation[-1]
    model = load_model(checkpoint)
    options = manifest.preparation.get("options", {})
    rows = [
        ("corpus", f"{options.get('corpus', '?')}: {manifest.split('train').bytes / 1e6:.1f} MB of text"),
        (
            "tokens in it",
            f"{manifest.split('train').tokens:,} (vocabulary {manifest.tokenizer.vocab_size:,})",
        ),
        (
            "model",
            f"{model.num_parameters():,} parameters, {model.num_parameters(embeddings=False):,} without "
            f"embeddings; attention {model.config.attention}",
        ),
        ("trained", _trained(checkpoint)),
        (
            "validation loss",
            f"{first['val/loss']:.3f} at step {first['step']} → "
            f"{last['val/loss']:.3f} at step {last['step']}",
        ),
        ("bits per byte", f"{first['val/bits_per_byte']:.3f} → {last['val/bits_per_byte']:.3f}"),
        ("speed", f"{statistics.median(m['speed/tokens_per_second'] for m in train):,.0f} tokens/s (median)"),
        ("newest checkpoint", f"`{checkpoint.folder}`"),
        ("TensorBoard", f"`tensorboard --logdir {run / 'tensorboard'}`"),
        ("more text", f'`dualroute generate --checkpoint {run} --prompt "…"`'),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"# {run.name}\n\n| | |\n|---|---|\n{table}\n\n## A sample\n\n```\n{sample}\n```\n"


def _trained(checkpoint: Checkpoint) -> str:
    own, total = int(checkpoint.metadata.get("tokens", 0)), total_tokens(checkpoint.metadata)
    with_others = f" ({total:,} with the trainings it began with)" if total != own else ""
    return f"{checkpoint.step} steps, {own:,} tokens{with_others}"


def _sample(checkpoint: Checkpoint, config: ReportConfig) -> str:
    model, tokenizer = load_model(checkpoint), Tokenizer(checkpoint.folder / TOKENIZER)
    ids = tokenizer.encode(config.prompt, bos=True)
    sampling = SamplingConfig(max_new_tokens=config.sample_tokens)
    return tokenizer.decode(ids + list(generate(model.float(), ids, sampling, tokenizer.eos_id)))
