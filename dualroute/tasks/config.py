"""What a task can be told: the fields of ``dualroute finetune`` that pretraining does not have, and those of
``dualroute predict``.

In: YAML and flags, through :mod:`dualroute.cli`.  Here: each group of fields is checked by itself.  Next:
:mod:`~dualroute.tasks.run` checks them against the data and the model.  No torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dualroute.data.mixture.config import check_mixture
from dualroute.errors import UserError
from dualroute.paths import LocalPath, NameOrModule, PathOrName
from dualroute.settings import above, at_least, check_fields
from dualroute.training.config import DataConfig, PretrainConfig, TrainConfig
from dualroute.training.optim_config import OptimConfig

Rule = Literal["obeyed", "refused", "compared"]
Format = Literal["auto", "csv", "tsv", "jsonl", "json", "parquet", "conll", "npz", "ratings"]


@dataclass
class ImageConfig:
    """How images are read.

    Args:
        height: Of every image, in pixels; null takes that of the first training image.
        width: Of every image, in pixels; null takes that of the first training image.
        channels: 1 (grey) or 3 (red, green, blue); images of other modes are converted.
        resize: Bring images of other sizes to this one; false leaves them out, counted.
        patch: Pixels a side of a patch; 1 reads single pixels as one long line, without a grid.
        region_height: Patches that a region has in a column; the global route chooses regions.
        region_width: Patches that a region has in a row; with region_height together model.block.
        learned_places: Add a learned vector for each place of the grid, besides the rotary embedding.
    """

    height: int | None = None
    width: int | None = None
    channels: int = 1
    resize: bool = False
    patch: int = 7
    region_height: int = 2
    region_width: int = 2
    learned_places: bool = False

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("height", "width", "patch"), at_least(1, 1 << 14))
        regions = dict.fromkeys(("region_height", "region_width"), at_least(1, 1 << 10))
        check_fields(self, "task.image", {**sizes, **regions})
        if self.channels not in (1, 3):
            raise UserError(f"task.image.channels is {self.channels}: give 1 (grey) or 3 (red, green, blue)")


@dataclass
class AudioConfig:
    """How recordings are read: as frames of log-mel energies, normalised to mean 0 and deviation 1 in each
    recording.

    Args:
        rate: Samples a second; recordings of another rate are resampled, several channels are averaged.
        mels: Energies of a frame.
        hop: Samples from one frame to the next.
        frame: Samples of a frame.
        stack: Frames that are one step of the model.
    """

    rate: int = 16000
    mels: int = 40
    hop: int = 160
    frame: int = 400
    stack: int = 2

    def __post_init__(self) -> None:
        check_fields(
            self,
            "task.audio",
            {
                "rate": at_least(1000, 192_000),
                "mels": at_least(2, 512),
                "hop": at_least(1, 1 << 16),
                "frame": at_least(4, 1 << 16),
                "stack": at_least(1, 64),
            },
        )
        if self.hop > self.frame:
            raise UserError(
                f"task.audio.hop {self.hop} is above task.audio.frame {self.frame}: samples between frames "
                f"would not be read; use {self.frame} at most"
            )


@dataclass
class TaskConfig:
    """What is learnt from a row.

    Args:
        kind: Of the task: the name of a file in dualroute/tasks/kinds (sequence, number, token, span, text,
            …), or a Python file of your own that registers one.
        columns: {what the kind calls it: column of the data}, where they differ (text: review).
        labels: Names of the classes, in the order of the outputs; null finds and sorts them.
        metric: Of the validation, by which the best checkpoint is known; null takes the kind's first, or the
            loss where answers are texts.  Given another one there (bleu, rougeL, exact_match), the model
            writes answers at each validation.
        metric_rows: Validation rows that the model writes on for such a metric, the first so many.
        pooling: Where a text's one output is read: last token, first, or mean of all; auto is last in a model
            that reads from left to right, else first.
        class_weights: balanced weighs each class by the inverse of its share of the training targets.
        label_smoothing: Share of a target's weight that is spread over all classes.
        stride: Tokens that the windows over a text have in common which is longer than the model may read
            (span).
        prompt: Text before the answer, with columns in braces (text).
        keep: Which part of a column stays that is too long for a prompt (text).
        max_new_tokens: Longest answer that is written (text, chat, preference).
        beta: How much a difference from the model that the run began with counts (preference).
        image: How images are read (image).
        audio: How recordings are read (speech, recognition).
    """

    kind: NameOrModule = "sequence"
    columns: dict[str, str] = field(default_factory=dict)
    labels: list[str] | None = None
    metric: str | None = None
    metric_rows: int = 64
    pooling: Literal["auto", "last", "first", "mean"] = "auto"
    class_weights: Literal["none", "balanced"] = "none"
    label_smoothing: float = 0.0
    stride: int = 128
    prompt: str = "{source}\n"
    keep: Literal["beginning", "end"] = "beginning"
    max_new_tokens: int = 64
    beta: float = 0.1
    image: ImageConfig = field(default_factory=ImageConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)

    def __post_init__(self) -> None:
        if isinstance(self.image, dict):  # of a task.json
            self.image = ImageConfig(**self.image)
        if isinstance(self.audio, dict):
            self.audio = AudioConfig(**self.audio)
        ranges = {
            "label_smoothing": at_least(0, 1),
            "stride": at_least(0),
            "max_new_tokens": at_least(1),
            "metric_rows": at_least(1),
            "beta": above(0, 1e3),
        }
        check_fields(self, "task", ranges)


@dataclass
class TaskDataConfig(DataConfig):
    """What is read.

    Args:
        path: Training rows: a csv, tsv, jsonl, json, parquet or conll file (also .gz, .xz or .bz2), a folder
            of them, or NAME[#SPLIT] of a data set on the Hugging Face hub.
        sources: Several such files that are mixed, each with its share of the windows: {path, weight, name,
            max_epochs}, or PATH=WEIGHT.
        stages, packing, fim_rate, fim_spm_rate, fim_tokens, shuffle_tokens: Without meaning here.
        temperature: Weights are taken to the power of 1 / temperature; above 1 makes them more alike.
        over_max_epochs: What happens where the run would read a source more often than its max_epochs:
            refuse to start, or report it.
        context: Slots of one window, into which whole examples are packed.
        num_workers: Processes that read ahead; 0 reads in the training process.
        val_tokens: Validate on so many slots, of rows evenly spread over all; null means on all.
        verify: Without meaning here: rows are read whole at every start.
        cache_dir: Without meaning here, as verify.
        cache_gib: Without meaning here, as verify.
        prefetch_shards: Without meaning here, as verify.
        fetch_timeout: Without meaning here, as verify.
        fetch_retries: Without meaning here, as verify.
        retry_seconds: Without meaning here, as verify.
        on_bad_data: Without meaning here, as verify.
        max_bad_windows: Without meaning here, as verify.
        validation: Validation rows; null takes a share of the training rows.
        test: Rows that ``dualroute evaluate`` takes where it is told no others.
        format: Of the files; auto goes by the name's ending.
        column_names: Of a csv or tsv file whose first line is a row already, and of a conll file.
        hub_config: Which configuration of the data set on the hub.
        validation_share: Of the training rows, chosen by a hash of the row.
        group: Column whose equal values stay on one side of that division (the document of a sentence).
        tokenizer: A sentencepiece .model or a tokenizer.json for a model that begins from scratch; null
            trains one on the training rows.  With init_from it is the checkpoint's.
        vocab_size: Ids of a tokenizer that is trained; null takes 4096, or what the rows allow.
        max_length: Longest example in tokens; null means context.
        too_long: What becomes of a longer one: truncate (counted and reported), drop or refuse.
        max_bad_rows: Largest share of rows that may be malformed; with more the run is refused.
        max_rows: Read the first so many rows of each part; null reads all.
        encoded: Folder in which encoded training examples are kept: one process encodes them, all processes
            of the machine read the same memory, and the next start with the same rows, tokenizer and settings
            finds them there; null encodes in the memory of each process at each start.
    """

    path: PathOrName | None = None  # type: ignore[assignment]
    validation: PathOrName | None = None
    test: PathOrName | None = None
    format: Format = "auto"
    column_names: list[str] | None = None
    hub_config: str | None = None
    validation_share: float = 0.1
    group: str | None = None
    tokenizer: LocalPath | None = None
    vocab_size: int | None = None
    max_length: int | None = None
    too_long: Literal["truncate", "drop", "refuse"] = "truncate"
    max_bad_rows: float = 0.01
    max_rows: int | None = None
    encoded: LocalPath | None = None

    def __post_init__(self) -> None:
        ranges = {
            **dict.fromkeys(("context", "val_tokens", "max_rows"), at_least(1)),
            "num_workers": at_least(0, 1024),
            "vocab_size": at_least(2, 1 << 24),
            "max_length": at_least(4),
            "validation_share": above(0, 0.9),
            "max_bad_rows": at_least(0, 1),
        }
        check_fields(self, "data", ranges)
        check_mixture(self.sources, [])
        plain = {"stages": [], "packing": "concatenate", "fim_rate": 0.0, "shuffle_tokens": None}
        for name, value in plain.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"data.{name} is for pretraining on shards: a task packs whole examples, with the "
                    "same weights from its beginning to its end; leave it out"
                )
        if self.sources:
            self.path = self.sources[0].path


#: What becomes of the keys that pretraining does not have when they are changed on resume; see
#: :mod:`dualroute.training.checkpointing.resumed_settings`.  What decides which examples there are is part of
#: the data's fingerprint, which is compared.
RESUME_RULES: dict[str, Rule] = {
    "task.kind": "refused",
    "task.columns": "compared",
    "task.labels": "compared",
    "task.metric": "obeyed",
    "task.metric_rows": "obeyed",
    "task.pooling": "compared",
    "task.class_weights": "obeyed",
    "task.label_smoothing": "obeyed",
    "task.stride": "compared",
    "task.prompt": "compared",
    "task.keep": "compared",
    "task.max_new_tokens": "obeyed",
    "task.beta": "obeyed",
    **{
        f"task.image.{name}": "compared"
        for name in (
            *("height", "width", "channels", "resize", "patch"),
            *("region_height", "region_width", "learned_places"),
        )
    },
    **{f"task.audio.{name}": "compared" for name in ("rate", "mels", "hop", "frame", "stack")},
    **{
        f"data.{name}": "compared"
        for name in (
            *("validation", "format", "column_names", "hub_config", "validation_share", "group", "tokenizer"),
            *("vocab_size", "max_length", "too_long", "max_rows"),
        )
    },
    "data.test": "obeyed",
    "data.max_bad_rows": "obeyed",
    "data.encoded": "obeyed",
}


@dataclass
class FinetuneConfig(PretrainConfig):
    """Train a model for a task, on rows of your own.

    Args:
        output: Run folder; everything the run writes lies there.
        seed: Seed of the initial weights and of the data's order.
        resume: auto continues from the newest finished checkpoint in the run folder, never starts afresh
            (refused where that would overwrite checkpoints), a path continues from that checkpoint.
        init_from: Checkpoint or run folder whose weights the run begins with; null begins from scratch.
        model: Shape of the model, unless init_from has it; also a file: --model configs/model/tiny.yaml.
        data: What is read.
        train: How much is trained (train.epochs, say), and in what portions.
        optim: Optimizer and learning rate.
        finetune: Which weights are trained, how fast by their depth, and when to stop.
        spike_guard: When the step of a bad batch is left out.
        checkpoint: When checkpoints are written and which ones stay; the best is so by task.metric.
        monitor: What is logged.
        parallel: How ranks share the work.
        watchdog: When a training that stands still is ended.
        task: What is learnt from a row.
    """

    resume_rules: ClassVar[dict[str, Rule]] = RESUME_RULES

    output: LocalPath = "runs/finetune"
    data: TaskDataConfig = field(default_factory=TaskDataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    # a few hundred rows are a few steps: small ones, and none of them to warm up
    train: TrainConfig = field(default_factory=lambda: TrainConfig(tokens_per_batch=2048, micro_batch=4))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(warmup_steps=0))


@dataclass
class PredictConfig:
    """Answer rows with a model that was trained for a task.

    Args:
        checkpoint: A run folder (its best checkpoint, by the task's metric) or a checkpoint folder.
        input: Rows: a csv, tsv, jsonl, json, parquet or conll file, or a folder of them.
        output: jsonl file to write: the rows' own columns, and what is predicted.  A run that was cut short
            goes on where it was.
        format: Of the input; auto goes by the name's ending.
        column_names: Of a csv or tsv file whose first line is a row already, and of a conll file.
        batch_size: Windows in one forward pass.
        device: auto, cpu, cuda, ….
        dtype: Arithmetic of the model; auto is float32, or what the kernels of its weights need.
    """

    checkpoint: LocalPath
    input: PathOrName
    output: LocalPath
    format: Format = "auto"
    column_names: list[str] | None = None
    batch_size: int = 8
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self, "", {"batch_size": at_least(1)})
