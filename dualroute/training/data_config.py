"""What a training can be told of its data: ``data`` in its configuration.  No torch is imported here.

Next: :mod:`dualroute.training.config`, of which it is a group; ``dualroute.training.prepare.shard_module``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dualroute.data.mixture.config import SourceConfig, StageConfig, check_mixture
from dualroute.data.remote.config import (
    BadDataPolicy,
    RemoteOptions,
    default_cache_folder,
    default_cache_gib,
)
from dualroute.errors import UserError
from dualroute.paths import DataPath, LocalPath
from dualroute.settings import Range, above, at_least, check_fields


@dataclass
class DataConfig:
    """What is read.

    Args:
        path: Folder of shards made by ``dualroute prepare``, or the address of such a set elsewhere:
            s3://bucket/set, https://host/set, any other URL of fsspec, or a command that writes the file {}
            to its standard output (pipe:aws s3 cp s3://bucket/set/{} -); with sources their first.
        sources: Several such folders that are mixed, each with its share of the samples: {path, weight, name,
            max_epochs}, or PATH=WEIGHT.
        stages: Other weights from a number of tokens on: {from_tokens, weights}, or
            FROM_TOKENS:NAME=WEIGHT,NAME=WEIGHT.
        temperature: Weights are taken to the power of 1 / temperature; above 1 makes them more alike.
        over_max_epochs: What happens where the run would read a source more often than its max_epochs:
            refuse to start, or report it.
        packing: How documents fill the windows of training: concatenate (end to end, cut where a window
            ends), best_fit (whole where they fit, padded), or one_per_row.
        fim_rate: Share of the documents that are told as prefix, suffix and middle, so that the model learns
            to fill in the middle.
        fim_spm_rate: Share of these with the suffix first.
        fim_tokens: The tokens that mark prefix, suffix and middle; null looks for the usual names.
        shuffle_tokens: Tokens among which the order of windows is random: those of so many whole shards at a
            time, so that a cache smaller than the data brings a shard once or twice an epoch; null means all.
        context: Tokens of one window: the longest distance that training sees.
        num_workers: Processes that read ahead; 0 reads in the training process.
        val_tokens: Validate on the first so many tokens of the validation split; null means all.
        verify: Check shards before the start by size, or by sha256 (remembered, so paid once).
        objective: What is to be found: next_token, by a causal model, or masked tokens, by one with
            model.causal false.
        mask_share: With objective masked, the share of the tokens that are hidden, whole words of them.
        cache_dir: Folder for copies of what lies elsewhere, shared by the processes of a node and best on a
            disk of its own; null takes $DUALROUTE_CACHE, or dualroute/shards in the user's cache.
        cache_gib: GiB that the copies may take up, over all sets; null takes $DUALROUTE_CACHE_GIB, or 64.
        prefetch_shards: Shards that lie elsewhere and are brought before they are needed; 0 brings none.
        fetch_timeout: Seconds without an answer, or with less than 1 KiB/s, after which a transfer has
            failed.
        fetch_retries: Further attempts, each after twice the time, up to 30 s; the file goes on where it
            broke.
        retry_seconds: Time before the first of them.
        on_bad_data: A window whose shard is damaged or cannot be had ends the run (fail), or is padding
            without labels (skip), with a warning.
        max_bad_windows: So many may be skipped on a rank between two starts.
    """

    path: DataPath = "data/stdlib"
    context: int = 512
    num_workers: int = 0
    val_tokens: int | None = None
    verify: Literal["size", "sha256"] = "sha256"
    objective: Literal["next_token", "masked"] = "next_token"
    mask_share: float = 0.3
    sources: list[SourceConfig] = field(default_factory=list)
    stages: list[StageConfig] = field(default_factory=list)
    temperature: float = 1.0
    over_max_epochs: Literal["refuse", "report"] = "refuse"
    packing: Literal["concatenate", "best_fit", "one_per_row"] = "concatenate"
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.5
    fim_tokens: list[str] | None = None
    shuffle_tokens: int | None = None
    cache_dir: LocalPath | None = None
    cache_gib: float | None = None
    prefetch_shards: int = 4
    fetch_timeout: float = 60.0
    fetch_retries: int = 8
    retry_seconds: float = 1.0
    on_bad_data: Literal["fail", "skip"] = "fail"
    max_bad_windows: int = 100

    #: of the keys about reading
    READ_RANGES: ClassVar[dict[str, Range]] = {
        "cache_gib": above(0, 1e9),
        "prefetch_shards": at_least(0, 1024),
        "fetch_timeout": above(0, 1e5),
        "fetch_retries": at_least(0, 1000),
        "retry_seconds": at_least(0, 3600),
    }

    def __post_init__(self) -> None:
        ranges = {"context": at_least(1), "val_tokens": at_least(1), "num_workers": at_least(0, 1024)}
        ranges |= {"shuffle_tokens": at_least(1)}
        ranges |= {"mask_share": above(0, 1), "fim_rate": at_least(0, 1), "fim_spm_rate": at_least(0, 1)}
        check_fields(self, "data", {**ranges, **self.READ_RANGES, "temperature": above(0, 100)})
        self._check_order()

    def _check_order(self) -> None:
        """Find what contradicts itself in the keys that say which tokens come when."""
        check_mixture(self.sources, self.stages)
        if self.sources:
            self.path = self.sources[0].path  # whatever a file below the flags says
        if self.fim_tokens is not None and len(self.fim_tokens) != 3:
            raise UserError(f"data.fim_tokens are {len(self.fim_tokens)}: give three, prefix, suffix, middle")
        if self.objective == "masked":
            for name in ("packing", "fim_rate"):
                if getattr(self, name) not in ("concatenate", 0):
                    raise UserError(
                        f"data.{name} {getattr(self, name)} works with data.objective next_token only: leave "
                        "it out"
                    )

    @property
    def remote(self) -> RemoteOptions:
        """How a set that lies elsewhere is read."""
        return RemoteOptions(
            self.cache_dir or default_cache_folder(),
            default_cache_gib() if self.cache_gib is None else self.cache_gib,
            self.fetch_timeout,
            self.fetch_retries,
            self.retry_seconds,
        )

    @property
    def bad_data(self) -> BadDataPolicy:
        """What becomes of windows that cannot be read."""
        return BadDataPolicy(self.on_bad_data, self.max_bad_windows)
