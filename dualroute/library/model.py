"""A model that is loaded: it writes, is measured, answers rows, and is exported.

In: a run folder, a checkpoint, an exported or another Hugging Face folder.  Here: :class:`Model` holds what
the commands load, and calls what they call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dualroute import threads
from dualroute.errors import UserError
from dualroute.library.options import configuration
from dualroute.model.decoding.sampling_config import SamplingConfig

if TYPE_CHECKING:
    from dualroute.data.tokenizer import Tokenizer
    from dualroute.evaluate.load import Loaded
    from dualroute.evaluate.perplexity import Score
    from dualroute.evaluate.sample import Written
    from dualroute.model import DualRoutingTransformer, ModelConfig
    from dualroute.tasks.answer import Answer
    from dualroute.tasks.evaluate import TaskScore

#: Options of ``dualroute evaluate`` that a loaded model has settled.
_SETTLED = ("checkpoint", "device", "dtype", "scale", "suite", "lengths", "samples", "compare")


def load(path: str | PathLike[str], device: str = "auto", dtype: str = "auto") -> Model:
    """Load a model.

    Args:
        path: A run folder (its newest finished checkpoint; of a task the best one), a checkpoint folder, a
            folder that ``dualroute export --format hf`` made, or another Hugging Face folder (Llama, Mistral,
            Qwen2, Qwen3, GPT-2; the last is measured only).
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda:1`` …
        dtype: ``float32``, ``bfloat16``, or ``auto``: float32, or what the kernels of quantised weights need.

    Raises:
        UserError: Nothing finished is there, a damaged file, or no such device.
    """
    threads.prepare()
    from dualroute.evaluate.load import load_any
    from dualroute.model.checkpoint.folder import TASK
    from dualroute.model.foreign.hub import is_foreign
    from dualroute.tasks.answer import task_checkpoint

    place = Path(path)
    if not is_foreign(place) and (best := task_checkpoint(place).folder / TASK).exists():
        return Model(load_any(best.parent, device, dtype))
    return Model(load_any(place, device, dtype))


class Model:
    """A model, its tokenizer and where it came from; made by :func:`load`.

    Attributes:
        module: The PyTorch model, in evaluation mode: ``hidden_states(ids)`` is (B, T) → (B, T, dim),
            ``head`` gives (…, dim) → (…, vocab_size) logits.
        tokenizer: ``encode(text)`` gives ids, ``decode(ids)`` text.
        folder: What was loaded.
        metadata: What ``checkpoint.json`` says: step, tokens, losses, lineage; empty for a foreign model.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self.module: DualRoutingTransformer = loaded.model.eval()
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.folder: Path = loaded.checkpoint.folder
        self.metadata: dict[str, Any] = loaded.checkpoint.metadata

    def __repr__(self) -> str:
        return f"Model({str(self.folder)!r}, {self.num_parameters:,} parameters, {self._loaded.device})"

    @property
    def config(self) -> ModelConfig:
        """Its shape."""
        return self.module.config

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied output matrix counted once, quantised ones included."""
        if hasattr(self.module, "num_parameters"):
            return int(self.module.num_parameters())
        return sum(one.numel() for one in self.module.parameters())  # a GPT-2

    def generate(self, prompt: str, sampling: SamplingConfig | None = None, **options: Any) -> str:
        """The continuation of ``prompt``, without it.

        Args:
            prompt: Text; may be empty.
            sampling: How tokens are drawn.
            **options: Fields of :class:`SamplingConfig` instead: ``max_new_tokens``, ``temperature``,
                ``top_p``, ``seed``, ``stop``, …

        Raises:
            UserError: An option that cannot be used, or a prompt as long as the model's context.
        """
        return "".join(self.stream(prompt, sampling, **options))

    def stream(self, prompt: str, sampling: SamplingConfig | None = None, **options: Any) -> Iterator[str]:
        """:meth:`generate`, piece by piece of whole characters."""
        how = _sampling(sampling, options)
        self._require_text()
        from dualroute.evaluate.sample import generate_text

        return generate_text(self.module, self.tokenizer, prompt, how)

    def generate_batch(
        self, prompts: Sequence[str], sampling: SamplingConfig | None = None, **options: Any
    ) -> list[Written]:
        """Several continuations at once, each what it is alone.

        Returns:
            For each prompt its ``text``, ``tokens``, ``ended`` (why it ended), ``seed``, ``logprobs``.
        """
        how = _sampling(sampling, options)
        self._require_text()
        if isinstance(prompts, str):
            raise UserError("generate_batch takes a list of prompts: for one prompt call generate")
        from dualroute.evaluate.sample import write_batch

        return write_batch(self.module, self.tokenizer, list(prompts), [how] * len(prompts))

    def evaluate(
        self, data: str | PathLike[str] | None = None, text: str | PathLike[str] | None = None, **options: Any
    ) -> Score | TaskScore:
        """What ``dualroute evaluate`` measures.

        Args:
            data: A folder of shards, whose validation split is scored; of a task's model rows, null being
                those that its training kept for it.
            text: A text file instead.
            **options: ``split``, ``context``, ``stride``, ``max_tokens``, ``batch_size``.

        Returns:
            ``loss`` (nats per token), ``perplexity``, ``bits_per_byte``; of a task ``metrics``, ``rows``.

        Raises:
            UserError: As the command says it.
        """
        for name in _SETTLED:
            if name in options:
                raise UserError(f"{name} is no option here: `dualroute evaluate --{name}` has it")
        given = {"data": data, "text": text, **options}
        given = {name: value for name, value in given.items() if value is not None}
        config = configuration("evaluate", {"checkpoint": str(self.folder)}, given)
        if config.text is None and self._is_of_task:
            from dualroute.tasks.evaluate import evaluate_task

            return evaluate_task(self._answerer(config.batch_size), config.data)
        from dualroute.evaluate.perplexity import evaluate_loaded

        return evaluate_loaded(self._loaded, config)

    def predict(self, rows: Iterable[Mapping[str, Any]], batch_size: int = 8) -> list[Answer]:
        """Answers of a model that was trained for a task.

        Args:
            rows: {column: value}, with the columns that it was trained on.
            batch_size: Windows in one forward pass.

        Returns:
            For each row ``prediction`` ({column: value}), or null and ``problem``.

        Raises:
            UserError: The model was trained for no task, or a column is missing.
        """
        if not self._is_of_task:
            raise UserError(f"{self.folder} was trained for no task: predict needs a model of `finetune`")
        answerer = self._answerer(batch_size)
        known = [dict(row) for row in rows]
        if known:
            answerer.kind.check_columns(known[0], with_target=False, source="rows")
        return list(answerer.answers(known))

    def export(self, output: str | PathLike[str], format: str = "hf", **options: Any) -> Path:
        """``dualroute export``: a folder that transformers, llama.cpp, onnxruntime or torch takes.

        Args:
            output: Folder to make.
            format: ``hf``, ``gguf``, ``onnx`` or ``torch-export``.
            **options: Those of the command: ``dtype``, ``layout``, ``quantize``, …

        Raises:
            UserError: As the command says it.
        """
        if not self.metadata:
            raise UserError(
                f"{self.folder} is no checkpoint of dualroute: `dualroute convert` makes one of it"
            )
        table = {"checkpoint": str(self.folder), "output": str(output), "format": format}
        config = configuration("export", table, options)
        from dualroute.export.command import export_command

        export_command(config)
        return Path(config.output)

    @property
    def _is_of_task(self) -> bool:
        from dualroute.model.checkpoint.folder import TASK

        return bool(self.metadata) and (self.folder / TASK).exists()

    def _answerer(self, batch_size: int) -> Any:
        from dualroute.tasks.answer import Answerer

        return Answerer(self.folder, batch_size=batch_size, loaded=self._loaded)

    def _require_text(self) -> None:
        if not hasattr(self.module, "new_caches"):
            raise UserError(f"{self.folder} has no caches to write with: dualroute measures such models only")
        self.config.require_causal("generate")


def _sampling(sampling: SamplingConfig | None, options: dict[str, Any]) -> SamplingConfig:
    known = {one.name for one in dataclasses.fields(SamplingConfig)}
    for name in options:
        if name not in known:
            from dualroute.configuration.names import nearest

            near = nearest(name, known)
            raise UserError(f"unknown option '{name}'" + (f"; did you mean '{near}'?" if near else ""))
    return dataclasses.replace(sampling or SamplingConfig(), **cast(dict[str, Any], options))
