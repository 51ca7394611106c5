"""The options of ``dualroute evaluate`` and ``dualroute generate``.  No torch is imported here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dualroute.data.mixture.config import SourceConfig, check_mixture
from dualroute.errors import UserError
from dualroute.model.decoding.sampling_config import SamplingConfig
from dualroute.paths import FolderOrHost, LocalPath, PathOrName, SuiteName
from dualroute.settings import at_least, check_fields

_OF_A_SUITE = ("suite", "lengths", "samples", "compare")


@dataclass
class EvaluateConfig:
    """Measure a checkpoint on held-out text, or one of a task on rows.

    Args:
        checkpoint: A run folder (its newest finished checkpoint), a checkpoint folder, or a Hugging Face
            folder.
        data: Folder of shards made by ``dualroute prepare`` with the checkpoint's tokenizer; for a checkpoint
            of a task a file or folder of rows, null taking data.test or data.validation of its training.
        sources: Several folders of shards with their shares, PATH=WEIGHT each: every source is scored, and
            the mixture.  Null, with neither data nor text, takes those that the model was trained on.
        text: A text file instead (.txt, also .gz, .xz or .bz2), read as one document.
        split: Which split of ``data``.
        context: Tokens the model sees at once; null takes the context it was trained with.
        stride: For ``text``: tokens between two windows.  Null means context (each token is read once); less
            gives every scored token a longer past and costs context / stride as much.
        max_tokens: Score only this many tokens from the start; null scores all.
        batch_size: Windows evaluated together.
        device: auto, cpu, cuda, ….
        dtype: Arithmetic of the model; auto is float32, or what the kernels of its weights need.
        cache_dtype: For ``text``: read each window block by block through the caches of decoding, whose
            complete blocks are kept so (int8, int4; auto: as the arithmetic): the loss that a text has which
            is written over such a cache.  Null reads it at once, without caches.
        scale: Heads to switch off or to scale, as ROUTE.LAYER.HEAD=FACTOR with commas between; see
            docs/behaviour/interpretability.md.
        output: Also write the figures to this JSON file; with a suite the same command goes on from it.
        suite: Measure a suite instead: the name of one in configs/suite, or a YAML file of your own.  Each of
            the other options then holds for every part of it that has such a setting.
        lengths: For the parts ruler: tokens of a text, as in --lengths 4096 16384.
        samples: For parts that have samples: so many at most.
        compare: The output of another suite: show what differs by more than chance.
    """

    checkpoint: LocalPath
    data: PathOrName | None = None
    text: LocalPath | None = None
    sources: list[SourceConfig] = field(default_factory=list)
    split: Literal["train", "val"] = "val"
    context: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    batch_size: int = 8
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    cache_dtype: Literal["auto", "int8", "int4"] | None = None
    scale: str | None = None
    output: LocalPath | None = None
    suite: SuiteName | None = None
    lengths: list[int] | None = None
    samples: int | None = None
    compare: LocalPath | None = None

    def __post_init__(self) -> None:
        counts = ("context", "stride", "max_tokens", "batch_size", "lengths", "samples")
        check_fields(self, "", dict.fromkeys(counts, at_least(1)))
        if self.suite is not None:
            if self.cache_dtype is not None:
                raise UserError("cache_dtype does not work with a suite: give --text FILE instead")
            return  # its parts know which of the options go together
        for name in _OF_A_SUITE[1:]:
            if getattr(self, name) is not None:
                raise UserError(f"{name} says nothing without a suite: give --suite NAME")
        given = [name for name in ("data", "text", "sources") if getattr(self, name)]
        if len(given) > 1:
            raise UserError(
                "give either --data (a folder of shards), --sources (several) or --text (a file), and not "
                f"{'both' if len(given) == 2 else 'all'}"
            )
        check_mixture(self.sources, [])
        if self.stride is not None and self.text is None:
            raise UserError("stride works with --text only: shards are scored in windows of context tokens")
        if self.cache_dtype is not None and self.text is None:
            raise UserError("cache_dtype works with --text only: a cache holds one document")

    def of_one_measure(self) -> dict[str, Any]:
        """The options that say something without a suite."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_A_SUITE}


@dataclass
class GenerateConfig:
    """Write text with a checkpoint.

    Args:
        checkpoint: A run folder (its newest finished checkpoint) or a checkpoint folder.
        prompt: Text to continue; "-" reads it from standard input.
        sampling: How tokens are drawn.
        stream: Print each piece of text as soon as it is there.
        device: auto, cpu, cuda, ….
        compile: Compile the step that makes one token into one program first (tens of seconds; needs a C++
            compiler on a CPU). Long texts are then written faster, with int8 weights most of all.
        cache_dtype: How the global route keeps keys and values of complete blocks of the text so far: auto is
            the arithmetic's type, int8 and int4 are integers.
        cache_offload: A folder for a file of these keys and values, of which a step reads the blocks it has
            chosen; it is reserved for the whole text at once, and gone at the end. host: the memory of the
            host, for a model on a GPU.
        dtype: Arithmetic of the model; auto is float32, or what the kernels of its weights need.
        scale: Heads to switch off or to scale, as ROUTE.LAYER.HEAD=FACTOR with commas between; see
            docs/behaviour/interpretability.md.
        samples: Texts to write; the one after the first has the next seed, and so on, so each of them is what
            its seed gives alone.
        batch_size: Texts that are written together.
        output: Also write the texts to this JSON file, with their tokens, why each ended, and with
            sampling.logprobs the log-probabilities.
    """

    checkpoint: LocalPath
    prompt: str = ""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stream: bool = True
    compile: bool = False
    cache_dtype: Literal["auto", "int8", "int4"] = "auto"
    cache_offload: FolderOrHost | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    scale: str | None = None
    samples: int = 1
    batch_size: int = 8
    output: LocalPath | None = None

    def __post_init__(self) -> None:
        counts = {"samples": at_least(1, 10_000), "batch_size": at_least(1, 1024)}
        check_fields(self, "", counts, may_be_empty=("prompt",))
        if self.sampling.logprobs is not None and self.output is None:
            raise UserError("sampling.logprobs are written to --output: give a JSON file")


@dataclass
class ChatConfig:
    """Talk with a checkpoint.

    Args:
        checkpoint: A run folder (its newest finished checkpoint) or a checkpoint folder.
        system: What the system says before the chat; empty for nothing.
        sampling: How tokens are drawn.
        cache_dtype: How the global route keeps keys and values of complete blocks of the chat: auto is the
            arithmetic's type, int8 and int4 are integers.
        device: auto, cpu, cuda, ….
        dtype: Arithmetic of the model; auto is float32, or what the kernels of its weights need.
        scale: Heads to switch off or to scale, as ROUTE.LAYER.HEAD=FACTOR with commas between; see
            docs/behaviour/interpretability.md.
    """

    checkpoint: LocalPath
    system: str = ""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    cache_dtype: Literal["auto", "int8", "int4"] = "auto"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    scale: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "", may_be_empty=("system",))
