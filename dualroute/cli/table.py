"""The commands of ``dualroute``: where each one's options and its function are.

Modules stand here as text and are imported when they are needed: that of the options to parse and to print
the help, which imports no torch; that of the function when it is called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A command whose options are the fields of a dataclass.

    Attributes:
        config: Module and name of the dataclass.
        function: Module and name of the function that takes it.
        summary: One line of help.
        arguments: Options that first words without dashes are the values of, in order.
    """

    config: tuple[str, str]
    function: tuple[str, str]
    summary: str
    arguments: tuple[str, ...] = ()

    def config_class(self) -> type:
        """The class of its options."""
        found: type = load(self.config)
        return found


@dataclass(frozen=True)
class Command:
    """A command of a family, with a few options of its own.

    Attributes:
        function: Module and name; it returns the exit status.
        summary: One line of help.
        argument: Name of its positional argument, and its help.
        required: {option: help} of those that must be given.
        choices: {option: its values, the default first}.
    """

    function: tuple[str, str]
    summary: str
    argument: tuple[str, str]
    required: dict[str, str] = field(default_factory=dict)
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """Commands under one word, as in ``dualroute checkpoint list``."""

    summary: str
    commands: dict[str, Command]


def load(name: tuple[str, str]) -> Any:
    """What a module holds under a name."""
    found: Callable[..., Any] = getattr(importlib.import_module(name[0]), name[1])
    return found


STAGES = {
    "prepare": Stage(
        ("data_prep.config", "PrepareConfig"),
        ("data_prep.prepare", "prepare_command"),
        "corpus → tokenizer → shards",
    ),
    "pretrain": Stage(
        ("dualroute.training.config", "PretrainConfig"),
        ("dualroute.training.run", "run_pretraining"),
        "shards → trained model",
    ),
    "finetune": Stage(
        ("dualroute.tasks.config", "FinetuneConfig"),
        ("dualroute.tasks.run", "run_finetuning"),
        "rows of your data → a model for a task",
    ),
    "predict": Stage(
        ("dualroute.tasks.config", "PredictConfig"),
        ("dualroute.tasks.predict", "predict_command"),
        "answers of such a model, row by row",
    ),
    "evaluate": Stage(
        ("dualroute.evaluate.config", "EvaluateConfig"),
        ("dualroute.tasks.evaluate", "evaluate_command"),
        "loss of a checkpoint, or its task's metrics",
    ),
    "chat": Stage(
        ("dualroute.evaluate.config", "ChatConfig"),
        ("dualroute.evaluate.chat", "chat_command"),
        "a conversation with a checkpoint in the terminal",
    ),
    "serve": Stage(
        ("dualroute.serve.config", "ServeConfig"),
        ("dualroute.serve.command", "serve"),
        "a checkpoint behind OpenAI's API, with a page to chat",
        arguments=("checkpoint",),
    ),
    "generate": Stage(
        ("dualroute.evaluate.config", "GenerateConfig"),
        ("dualroute.evaluate.sample", "generate_command"),
        "text from a checkpoint",
    ),
    "inspect": Stage(
        ("dualroute.evaluate.inspect.config", "InspectConfig"),
        ("dualroute.evaluate.inspect.command", "inspect_command"),
        "what a model reads in a text, as a page",
        arguments=("checkpoint",),
    ),
    "runs": Stage(
        ("dualroute.training.runs.config", "RunsConfig"),
        ("dualroute.training.runs.table", "show_runs"),
        "what has become of the runs in a folder",
        arguments=("folder",),
    ),
    "runs compare": Stage(
        ("dualroute.training.runs.config", "CompareRunsConfig"),
        ("dualroute.training.runs.compare", "compare_runs"),
        "settings and losses of two runs",
        arguments=("first", "second"),
    ),
    "runs clean": Stage(
        ("dualroute.training.runs.config", "CleanRunsConfig"),
        ("dualroute.training.runs.clean", "clean_runs"),
        "remove what no run will use, after asking",
        arguments=("folder",),
    ),
    "report": Stage(
        ("dualroute.training.monitoring.config", "ReportConfig"),
        ("dualroute.training.monitoring.report", "report"),
        "one page on a run",
    ),
    "convert": Stage(
        ("dualroute.compress.config", "ConvertConfig"),
        ("dualroute.compress.convert", "convert_command"),
        "a model from elsewhere, or dense → dual attention",
    ),
    "distill": Stage(
        ("dualroute.distillation.config", "DistillConfig"),
        ("dualroute.distillation.run", "run_distillation"),
        "shards and a teacher → trained student",
    ),
    "cache-logits": Stage(
        ("dualroute.distillation.config", "CacheLogitsConfig"),
        ("dualroute.distillation.cache_logits", "cache_logits"),
        "a teacher's likeliest tokens, written once for distill",
    ),
    "prune": Stage(
        ("dualroute.compress.config", "PruneConfig"),
        ("dualroute.compress.prune", "prune"),
        "trained model → smaller model",
    ),
    "sparsify": Stage(
        ("dualroute.compress.config", "SparsifyConfig"),
        ("dualroute.compress.sparsify", "sparsify"),
        "single weights to zero (research)",
    ),
    "quantize": Stage(
        ("dualroute.compress.config", "QuantizeConfig"),
        ("dualroute.compress.quantize", "quantize"),
        "weights of a checkpoint in int8, int4 or float8",
    ),
    "export": Stage(
        ("dualroute.export.config", "ExportConfig"),
        ("dualroute.export.command", "export_command"),
        "a checkpoint for transformers, onnxruntime or torch.export",
    ),
    "pipeline": Stage(
        ("dualroute.pipeline.config", "PipelineConfig"),
        ("dualroute.pipeline.run", "run_pipeline"),
        "all stages, from text to a model that ships",
    ),
    "estimate": Stage(
        ("dualroute.estimate.config", "EstimateConfig"),
        ("dualroute.estimate.command", "estimate_command"),
        "memory, longest context and hours of a run",
    ),
    "data verify": Stage(
        ("dualroute.data.verify", "VerifyDataConfig"),
        ("dualroute.data.verify", "verify_data"),
        "every file of a data set against its sha256",
    ),
    "data show": Stage(
        ("dualroute.data.tools.config", "ShowDataConfig"),
        ("dualroute.data.tools.inspect", "show_data"),
        "what a data set holds",
    ),
    "data generate": Stage(
        ("data_prep.teacher.config", "GenerateDataConfig"),
        ("data_prep.teacher.generate", "generate_data"),
        "training text from a model behind an API",
    ),
    "data inspect": Stage(
        ("dualroute.data.tools.config", "ShowDataConfig"),
        ("dualroute.data.tools.inspect", "inspect_data"),
        "what a data set holds, in tables",
        ("data",),
    ),
    "data stats": Stage(
        ("dualroute.data.tools.config", "StatsDataConfig"),
        ("dualroute.data.tools.stats", "stats_data"),
        "lengths, sources, languages, duplicates of its documents, in tables and figures",
        ("data",),
    ),
    "data sample": Stage(
        ("dualroute.data.tools.config", "SampleDataConfig"),
        ("dualroute.data.tools.sample", "sample_data"),
        "documents of a data set as text",
        ("data",),
    ),
    "data diff": Stage(
        ("dualroute.data.tools.config", "DiffDataConfig"),
        ("dualroute.data.tools.diff", "diff_data"),
        "what two data sets do not have in common",
        ("first", "second"),
    ),
    "doctor": Stage(
        ("dualroute.doctor.config", "DoctorConfig"),
        ("dualroute.doctor.command", "doctor"),
        "can this machine train?",
    ),
}

_LOOKED_AT = "dualroute.training.checkpointing.inspection"
_CHECKPOINTS = "dualroute.training.checkpointing.commands"
FAMILIES = {
    "checkpoint": Family(
        "list, verify, export or convert checkpoints",
        {
            "list": Command(
                (_LOOKED_AT, "list_checkpoints"),
                "one line for each checkpoint of a run",
                ("run", "run folder"),
            ),
            "verify": Command(
                (_LOOKED_AT, "verify"),
                "compare every file with its sha256",
                ("path", "checkpoint folder, or run folder"),
            ),
            "export": Command(
                (_CHECKPOINTS, "export"),
                "the weights, the configuration and the tokenizer in a folder of their own",
                ("checkpoint", "checkpoint folder, or run folder"),
                {"output": "folder to write"},
                {"dtype": ("auto", "float32", "bfloat16", "float16")},
            ),
            "convert": Command(
                (_CHECKPOINTS, "convert"),
                "the training state as a DeepSpeed universal checkpoint",
                ("checkpoint", "checkpoint folder, or run folder"),
                {"output": "folder to write"},
            ),
        },
    ),
}

#: Commands that are neither.
OTHERS = {
    "configs": "list the configurations that come with dualroute, or show one",
    "notebook": "copy the notebook of a first model into a folder, this one by default",
    "completion": "what a shell reads to complete commands and options: bash, zsh or fish",
    "submit": "a training, a sweep or a chain of stages as jobs of Slurm",
}
