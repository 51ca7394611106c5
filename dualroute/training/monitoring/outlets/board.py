"""What TensorBoard is shown, and in which order.

In: tags and numbers from :mod:`dualroute.training.monitoring.monitor`.  Here: :class:`Board` writes curves
and keeps back those that have not moved yet, lays the charts out (loss, quality, speed, routing, data,
system) for the tab Custom Scalars, and puts the run's settings into the tab HParams.  Next: the event files.

A figure that never changes has no card.  It stands in ``metrics.jsonl`` all the same.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

#: (category, chart, tags as regular expressions).  ``{}`` makes a chart for each text that it stands for.
CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Loss", "loss", ("train/loss", "val/loss")),
    ("Loss", "loss by source", ("val/loss_by_source/.+",)),
    ("Loss", "perplexity", ("train/perplexity", "val/perplexity")),
    ("Loss", "distillation", ("distill/.+",)),
    ("Loss", "learning rate", ("optim/lr",)),
    ("Loss", "gradient norm", ("optim/grad_norm",)),
    ("Loss", "z loss", ("train/z_loss",)),
    ("Quality", "bits per byte", ("train/bits_per_byte", "val/bits_per_byte")),
    ("Quality", "bits per byte by source", ("val/bits_per_byte_by_source/.+",)),
    ("Quality", "val/{}", ("val/{}",)),
    ("Quality", "eval/{}", ("eval/{}/.+",)),
    ("Speed", "tokens per second", ("speed/tokens_per_second",)),
    ("Speed", "model FLOPs utilisation", ("speed/mfu",)),
    ("Speed", "seconds of a step", ("speed/step_time",)),
    ("Speed", "seconds of checkpoints", ("speed/checkpoint_time",)),
    ("Routing", "where attention goes, mean of the layers", ("router/mass_.+/mean",)),
    ("Routing", "entropy of the router", ("router/router_entropy/layer_.+", "router/router_entropy/mean")),
    ("Routing", "mass on chosen blocks", ("router/mass_selected/layer_.+",)),
    ("Routing", "mass on far blocks", ("router/mass_far/layer_.+",)),
    ("Routing", "gates, mean of the layers", ("router/gate_.+/mean",)),
    ("Data", "share of the time spent waiting for data", ("speed/data_wait_share",)),
    ("Data", "tokens", ("train/tokens",)),
    ("Data", "epochs", ("train/epoch",)),
    ("Data", "skipped steps", ("train/skipped_steps",)),
    ("System", "memory, GiB", ("memory/.+",)),
)
#: Curves that are shown from their first point on.
_ALWAYS = (
    "train/loss",
    "train/perplexity",
    "train/bits_per_byte",
    "val/",
    "eval/",
    "speed/tokens_per_second",
)

#: Settings in which runs are compared, besides those that were given.
HPARAMS = (
    "data.context",
    "model.dim",
    "model.num_layers",
    "optim.lr",
    "train.tokens_per_batch",
    "train.max_steps",
)
_NO_HPARAMS = re.compile(
    r"(output|resume|monitor|watchdog|checkpoint|parallel\.timeout_minutes|data\.path)(\.|$)"
)
RESULTS = ("val/loss", "val/perplexity", "val/bits_per_byte", "train/loss", "speed/tokens_per_second")


class Board:
    """Writes through a SummaryWriter.

    Args:
        writer: The writer.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        self._still: dict[str, tuple[int, int, float]] = {}  # tag → first and last step of its only value
        self._tags: set[str] = set()
        self._laid_out: tuple[Any, ...] = ()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves."""
        for tag, value in values.items():
            self._add(tag, float(value), step)
        layout = layout_of(self._tags)
        if layout and tuple(_flat(layout)) != self._laid_out:
            self._laid_out = tuple(_flat(layout))
            self.writer.add_custom_scalars(layout)  # the newest counts
        self.writer.flush()

    def _add(self, tag: str, value: float, step: int) -> None:
        if tag not in self._tags and not tag.startswith(_ALWAYS):
            first, last, before = self._still.get(tag, (step, step, value))
            if value == before or (math.isnan(value) and math.isnan(before)):
                self._still[tag] = (first, step, value)
                return
            for earlier in dict.fromkeys((first, last)):
                self.writer.add_scalar(tag, before, earlier)
            del self._still[tag]
        self._tags.add(tag)
        self.writer.add_scalar(tag, value, step)

    def settings(self, text: str, given: Iterable[str] = ()) -> None:
        """The run in the tab HParams.

        Args:
            text: The resolved configuration, YAML.
            given: Dotted keys that were given for this run.
        """
        from torch.utils.tensorboard.summary import hparams

        chosen = hparams_of(text, given)
        if chosen:
            for summary in hparams(chosen, dict.fromkeys(RESULTS, 0.0))[
                :2
            ]:  # the third says that it has ended
                _add_summary(self.writer, summary)

    def ended(self, *, well: bool) -> None:
        """Let HParams know that the run is over."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        status = api_pb2.STATUS_SUCCESS if well else api_pb2.STATUS_FAILURE
        content = plugin_data_pb2.HParamsPluginData(
            session_end_info=plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time()),
            version=metadata.PLUGIN_DATA_VERSION,
        )
        plugin = SummaryMetadata.PluginData(
            plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString()
        )
        value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=SummaryMetadata(plugin_data=plugin))
        _add_summary(self.writer, Summary(value=[value]))


def _add_summary(writer: Any, summary: Any) -> None:
    # a TensorBoardLogger of a person's own Trainer has no such method
    (getattr(writer, "add_summary", None) or writer.file_writer.add_summary)(summary)


def layout_of(tags: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """The charts that some of ``tags`` belong to, for ``SummaryWriter.add_custom_scalars``."""
    tags = sorted(tags)
    layout: dict[str, dict[str, list[Any]]] = {}
    taken: set[str] = set()
    for category, title, patterns in CHARTS:
        for name in _names(patterns[0], tags) if "{}" in title else [""]:
            of_name = [pattern.replace("{}", re.escape(name)) for pattern in patterns]
            found = {tag for tag in tags if any(re.fullmatch(pattern, tag) for pattern in of_name)} - taken
            if found:
                taken |= found
                patterns_shown = [f"^{pattern}$" for pattern in of_name]
                layout.setdefault(category, {})[title.replace("{}", name)] = ["Multiline", patterns_shown]
    return layout


def _names(pattern: str, tags: Iterable[str]) -> list[str]:
    before, _, after = pattern.partition("{}")
    found = (re.fullmatch(f"{before}([^/]+){after}", tag) for tag in tags)
    return list(dict.fromkeys(match[1] for match in found if match))


def _flat(layout: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    return ((category, chart) for category, charts in layout.items() for chart in charts)


def hparams_of(text: str, given: Iterable[str] = ()) -> dict[str, float | bool | str]:
    """The settings of a run by which it is compared with others; empty where ``text`` holds none."""
    try:
        table = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    chosen: dict[str, float | bool | str] = {}
    for key in dict.fromkeys((*HPARAMS, *sorted(given))):
        value: Any = table
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None or isinstance(value, dict) or _NO_HPARAMS.match(key):
            continue
        chosen[key] = value if isinstance(value, bool | int | float | str) else str(value)
    return chosen
