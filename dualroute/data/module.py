"""The shards as Lightning sees them: which windows are read, in which order.

In: the path of a dataset folder, or several with their weights, and the batch arithmetic. Here: `plan` (which
samples, in which order), `mixture` (from which folder) and `reader` (their tensors) are put together. Out:
batches for the training module's ``training_step``, by the loaders of
:class:`~dualroute.data.window_module.WindowDataModule`.

Batch: ``input_ids``, ``labels``, ``segment_ids``, ``positions``, int64 (micro_batch, context), as
`WindowDataset` describes them, and ``num_targets``, 0-dim int64: labels to predict in the whole step, over
all ranks and micro batches. A loss summed over its own labels and divided by ``num_targets`` adds up to the
global mean without communication. `num_targets` stays on the host, which divides by it. With a
``mask_share`` labels are tokens that were hidden, see `dualroute.data.masking`. A module that sets
``layout_plan`` also gets ``layout`` and ``label_rows``, see `dualroute.data.reader.collate`. A validation
batch of a mixture is of one source, whose number ``source`` is on the host too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from dualroute.data.manifest import Manifest, canonical_json
from dualroute.data.masking import Masking
from dualroute.data.mixture.config import SourceConfig, StageConfig, lines_over_max_epochs
from dualroute.data.mixture.history import Course, merged, refuse_other_past
from dualroute.data.mixture.plan import MixturePlan, MixtureSequence, WalkSources
from dualroute.data.mixture.schedule import Schedule, turns_of
from dualroute.data.mixture.sources import OpenSource, Reading, open_sources
from dualroute.data.mixture.windows import MixtureWindows
from dualroute.data.order.packing import PackedRows, Packing, use_line
from dualroute.data.plan import BatchPlan, SequentialPlan
from dualroute.data.remote.config import BadDataPolicy, RemoteOptions
from dualroute.data.remote.prefetch import Wanted, read_ahead
from dualroute.data.verify import verify_once
from dualroute.data.window_module import MAX_WORKERS, Batch, WindowDataModule
from dualroute.errors import UserError

__all__ = ["MAX_WORKERS", "Batch", "ShardDataModule", "WindowDataModule"]


class ShardDataModule(WindowDataModule):
    """Training and validation batches of dataset folders made by `dualroute prepare`.

    Args:
        path: the dataset folder; of a mixture the first.
        context, micro_batch, tokens_per_batch, seed, num_workers: see `WindowDataModule`.
        val_tokens: validate on the first so many tokens of the split ``val`` (of each source); None: on all
            of them.
        verify: ``size`` checks the files' sizes at start, ``sha256`` also their contents (once per copy
            of the data).
        mask_share: of the tokens that are hidden, to be found from both sides; None: labels are next tokens.
        sources: what is mixed; none: ``path`` alone.
        stages, temperature: of the mixture, see ``dualroute.training.config.DataConfig``.
        packing, fim_rate, fim_spm_rate, fim_tokens, shuffle_tokens: see there.
        remote: how a set that lies elsewhere is read; None for the defaults.
        prefetch_shards: shards of such a set that are brought before they are needed.
        policy: what becomes of windows that cannot be read; None: the run ends.

    Attributes:
        bad_windows: training windows that were skipped since the start, on this rank.
    """

    def __init__(
        self,
        path: str | Path,
        context: int,
        micro_batch: int,
        tokens_per_batch: int,
        seed: int = 0,
        num_workers: int = 0,
        val_tokens: int | None = None,
        verify: Literal["size", "sha256"] = "size",
        mask_share: float | None = None,
        *,
        sources: Sequence[SourceConfig] = (),
        stages: Sequence[StageConfig] = (),
        temperature: float = 1.0,
        packing: Packing = "concatenate",
        fim_rate: float = 0.0,
        fim_spm_rate: float = 0.5,
        fim_tokens: Sequence[str] | None = None,
        remote: RemoteOptions | None = None,
        prefetch_shards: int = 4,
        policy: BadDataPolicy | None = None,
        shuffle_tokens: int | None = None,
    ) -> None:
        if verify not in ("size", "sha256"):
            raise UserError(f"verify must be 'size' or 'sha256', not {verify!r}")
        if mask_share is not None and not 0 < mask_share <= 1:
            raise UserError(f"mask_share must be above 0 and at most 1, not {mask_share}")
        name = ", ".join(source.path for source in sources) or str(path)
        super().__init__(name, context, micro_batch, tokens_per_batch, seed, num_workers)
        self.path = str(sources[0].path if sources else path)
        self.prefetch_shards, self.policy = prefetch_shards, policy or BadDataPolicy()
        self.bad_windows = 0
        self.val_tokens = val_tokens
        self.verify = verify
        self.mask_share = mask_share
        self.mixed, self.stages, self.temperature = tuple(sources), tuple(stages), temperature
        tokens = None if fim_tokens is None else tuple(fim_tokens)
        self.reading = Reading(
            context,
            self.samples_per_batch,
            seed,
            mask_share,
            packing,
            fim_rate,
            fim_spm_rate,
            tokens,
            remote,
            self.policy,
            shuffle_tokens,
        )
        #: makes the training windows into a dataset that adds to them (a teacher's logits, say)
        self.extend: Callable[[Any], Dataset[Any]] | None = None

    @cached_property
    def sources(self) -> list[OpenSource]:
        """The folders, opened on first use.

        Raises:
            UserError: see `open_sources`.
        """
        return open_sources(self.mixed or [SourceConfig(str(self.path))], self.reading)

    @property
    def manifest(self) -> Manifest:
        """That of the (first) folder, whose tokenizer is that of all."""
        return self.sources[0].manifest

    # ------------------------------------------------------------------ the mixture

    @cached_property
    def course(self) -> Course:
        """Which sources are read in which shares, from which sample on.

        Raises:
            UserError: two stages begin within one window.
        """
        by_name = {source.name: source for source in self.sources}

        def turns(weights: Mapping[str, float]) -> dict[str, int]:
            keyed = {by_name[name].key: weight for name, weight in weights.items()}
            return turns_of(keyed, self.temperature)

        first = {
            source.name: (
                source.manifest.split("train").tokens
                if source.config.weight is None
                else source.config.weight
            )
            for source in self.sources
        }
        stages = [(0, turns(first))]
        for stage in self.stages:
            sample = -(-stage.from_tokens // self.context)
            if sample <= stages[-1][0]:
                raise UserError(
                    f"data.stages from_tokens {stage.from_tokens} begins within a window of data.context "
                    f"{self.context} of the stage before: move one of them"
                )
            stages.append((sample, turns(stage.weights)))
        return Course(merged(stages), {source.key: source.name for source in self.sources}, self.context)

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Of the data that the run begins with: the manifest's, where that is a single folder as it is."""
        turns = self.course.stages[0][1]
        if len(turns) == 1:
            return next(iter(turns))
        return hashlib.sha256(canonical_json({"mixture": turns})).hexdigest()

    @property
    def order_fingerprint(self) -> str:
        """Of all that decides which samples come when, stages that begin later included."""
        stages = self.course.stages
        if len(stages) == 1:
            return self.fingerprint
        return hashlib.sha256(canonical_json({"stages": stages})).hexdigest()

    @property
    def val_fingerprint(self) -> str:
        """Of the folders that are validated on."""
        held = sorted(source.manifest.fingerprint for source in self.sources if source.has_validation)
        if len(self.sources) == 1:
            return self.manifest.fingerprint
        return hashlib.sha256(canonical_json({"validation": held})).hexdigest()

    @property
    def is_mixture(self) -> bool:
        """Whether there are several folders."""
        return len(self.sources) > 1

    @property
    def val_sources(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(source.name for source in self.sources) if self.is_mixture else ()

    def refuse_other_past(self, metadata: Mapping[str, Any], where: str) -> None:
        if self._is_read_otherwise(metadata):
            return  # refused by the keys that say so
        said = metadata.get("mixture")
        theirs_of = metadata.get("data_fingerprint")
        if said is None and not isinstance(theirs_of, str):
            return
        theirs = (
            Course([(0, {str(theirs_of): 1})], {}, self.context)
            if said is None
            else Course.from_json(said, self.context)
        )
        if said is None and not self.is_mixture and len(self.course.stages) == 1:
            return  # one folder and another: refused by its fingerprint
        position = metadata.get("samples_consumed", int(metadata.get("tokens", 0)) // self.context)
        refuse_other_past(theirs, self.course, int(position), where)

    def _is_read_otherwise(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a checkpoint's samples had another seed or context, or were packed otherwise."""
        mine = {"context": self.context, "seed": self.seed}
        if any(metadata.get(key) not in (None, value) for key, value in mine.items()):
            return True
        settings = metadata.get("settings")
        data = settings.get("data") if isinstance(settings, Mapping) else None
        if not isinstance(data, Mapping) or not data.keys() >= {"packing", "fim_rate"}:
            return False
        rate, among = data["fim_rate"], data.get("shuffle_tokens")
        mine_told = (self.reading.packing, self.reading.fim_rate, self.reading.shuffle_tokens)
        if (data["packing"], rate, among) != mine_told:
            return True
        names = data.get("fim_tokens")
        theirs = (data.get("fim_spm_rate"), None if names is None else tuple(names))
        return bool(rate) and theirs != (self.reading.fim_spm_rate, self.reading.fim_tokens)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self.describe_order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `WindowDataModule.load_state_dict`; the course of a mixture may differ in what is to come.

        Raises:
            UserError: see there; or what was read until then is not what this module would have read.
        """
        told = {**state_dict, "data_fingerprint": state_dict.get("fingerprint")}
        if isinstance(state_dict.get("samples_consumed"), int):
            self.refuse_other_past(told, "the checkpoint")
        super().load_state_dict(state_dict)

    def describe_order(self) -> dict[str, Any]:
        return {"mixture": self.course.to_json()} if self.is_mixture else {}

    def stages_for_people(self) -> list[dict[str, Any]]:
        if not self.is_mixture:
            return []
        folders = {
            source.name: {"path": source.manifest.place, "fingerprint": source.manifest.fingerprint}
            for source in self.sources
        }
        return [
            {**line, "sources": {name: folders[name] for name in line["weights"]}}
            for line in self.course.lines()
        ]

    def source_figures(self) -> dict[str, float]:
        plan = self.plan
        if not isinstance(plan, MixturePlan):
            return {}
        names = [source.name for source in self.sources]
        return plan.figures(names, self.samples_consumed, self.skipped_samples)

    def epochs_at(self, samples: int) -> dict[str, float]:
        plan = self.plan
        if not isinstance(plan, MixturePlan):
            return {self.sources[0].name: plan.epochs(samples)}
        passes = plan.epochs_by_source(samples)
        return {source.name: epochs for source, epochs in zip(self.sources, passes, strict=True)}

    def over_max_epochs(self, samples: int) -> Iterator[str]:
        yield from lines_over_max_epochs([source.config for source in self.sources], self.epochs_at(samples))

    def order_lines(self) -> Iterator[str]:
        if self.is_mixture:
            for line in self.course.lines():
                shares = ", ".join(f"{name} {share:.4g}" for name, share in line["weights"].items())
                yield f"mixture from token {line['from_tokens']:,} on: {shares}"
        if self.is_mixture or self.reading.packing != "concatenate" or self.reading.fim_rate:
            for source in self.sources:
                yield f"{source.name}: {use_line(source.use(), self.reading.packing)}"
        yield from filter(None, (source.shuffle_line() for source in self.sources))

    # ------------------------------------------------------------------ plans

    @cached_property
    def plan(self) -> BatchPlan | PackedRows | MixturePlan:  # type: ignore[override]
        """The order of training, made on first use.

        Raises:
            UserError: the data are unusable or shorter than one window.
        """
        plans = [source.plan for source in self.sources]
        if not self.is_mixture:
            return plans[0]
        return MixturePlan(plans, Schedule(tuple(s.key for s in self.sources), tuple(self.course.stages)))

    @cached_property
    def val_plan(self) -> SequentialPlan | MixtureSequence:  # type: ignore[override]
        """The windows of validation, made on first use.

        Raises:
            UserError: there are no validation documents.
        """
        if not any(source.has_validation for source in self.sources):
            raise UserError(
                f"{self.data_name}: the split 'val' has no documents; prepare the data with a validation "
                "share, or train without validation (limit_val_batches=0)"
            )
        plans = [source.val_plan(self.val_tokens) for source in self.sources]
        return MixtureSequence(plans) if self.is_mixture else plans[0]

    def targets_per_byte(self, split: str) -> float | None:
        """See `WindowDataModule.targets_per_byte`; of the training text of a mixture it depends on the stage,
        and is not told, nor where texts are told in another order."""
        if split == "train":
            plain = not self.is_mixture and not self.reading.fim_rate
            return self.manifest.split(split).targets_per_byte if plain else None
        if not self.is_mixture:
            return self.manifest.split(split).targets_per_byte
        plan = self.val_plan
        assert isinstance(plan, MixtureSequence)
        tokens = [part.tokens for part in plan.parts]
        parts = zip(tokens, self.val_targets_per_byte, strict=True)
        return sum(tokens) / sum(count / density for count, density in parts if count)

    @property
    def val_targets_per_byte(self) -> tuple[float, ...]:  # type: ignore[override]
        return tuple(
            source.manifest.split("val").targets_per_byte if source.has_validation else 1.0
            for source in self.sources
        )

    def prepare_data(self) -> None:
        """Check the files; Lightning calls it on one rank per node."""
        for source in self.sources:
            verify_once(source.manifest, self.verify, self.policy)

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if stage in ("fit", None):
            _ = self.masking

    @property
    def masking(self) -> Masking | None:
        """How tokens of the (first) folder are hidden; None where they are not.

        Raises:
            UserError: the tokenizer cannot be read, or has no id for a hidden token.
        """
        return self.sources[0].masking

    # ------------------------------------------------------------------ windows

    def train_windows(self) -> Dataset[Any]:
        if not self.is_mixture:
            (source,) = self.sources
            windows = source.windows()
            return source.masked(windows) if self.extend is None else self.extend(windows)
        mixed = MixtureWindows([source.masked(source.windows()) for source in self.sources])
        return mixed if self.extend is None else self.extend(mixed)

    def val_windows(self) -> Dataset[Any]:
        plan = self.val_plan
        if not isinstance(plan, MixtureSequence):
            (source,) = self.sources
            windows = source.val_windows(plan)
            assert windows is not None
            return source.masked(windows)
        parts: list[Any] = []
        for source, part in zip(self.sources, plan.parts, strict=True):
            assert isinstance(part, SequentialPlan)
            windows = source.val_windows(part)
            parts.append(None if windows is None else source.masked(windows))
        return MixtureWindows(parts, tell_source=True)

    def train_sampler(self, rank: int, world_size: int) -> Any:
        return self._ahead(super().train_sampler(rank, world_size), "train")

    def val_sampler(self, rank: int, world_size: int) -> Any:
        plan = self.val_plan
        if isinstance(plan, MixtureSequence):
            return self._ahead(WalkSources(plan, rank, world_size, self.micro_batch), "val")
        return self._ahead(super().val_sampler(rank, world_size), "val")

    def _ahead(self, sampler: Any, split: str) -> Any:
        """The sampler, which has the shards of sources that lie elsewhere brought before they are needed."""
        if not self.prefetch_shards or all(source.manifest.mirror is None for source in self.sources):
            return sampler
        wanted = Wanted([source.manifest for source in self.sources], split, self._plans(split))
        return read_ahead(sampler, wanted.of, self.prefetch_shards)

    def _plans(self, split: str) -> Sequence[Any]:
        """The plan of each source."""
        if split == "train":
            return [source.plan for source in self.sources]
        return self.val_plan.parts if isinstance(self.val_plan, MixtureSequence) else [self.val_plan]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """All but `num_targets` and ``source``, which the host would have to ask for again.

        Raises:
            UserError: more windows were skipped than the policy allows.
        """
        self._count_skipped(batch.pop("skipped", None))
        source = batch.pop("source", None)
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved if source is None else {**moved, "source": max(int(source.max()), 0)}

    def _count_skipped(self, skipped: torch.Tensor | None) -> None:
        if skipped is None or not (count := int(skipped.sum())):
            return
        self.bad_windows += count
        if self.bad_windows > self.policy.max_bad_windows:
            raise UserError(
                f"{self.data_name}: {self.bad_windows} windows could not be read since the start, more than "
                f"data.max_bad_windows {self.policy.max_bad_windows} (the warnings above name their shards); "
                "mend the data, or allow more"
            )
