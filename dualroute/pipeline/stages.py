"""The plan of a pipeline: which commands, in which order, reading what and writing where.

In: a :class:`~dualroute.pipeline.config.PipelineConfig`.  Out: a list of :class:`Stage`, each a command of
``dualroute`` with all its arguments.  Next: :mod:`~dualroute.pipeline.run` does them one after the other, and
``dualroute submit pipeline`` makes jobs of them.

The pipeline knows no stage from the inside.  What it fills in is paths; everything else
is options of commands that can be run by hand, and ``--dry-run`` prints exactly those.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualroute.errors import UserError
from dualroute.pipeline.config import PipelineConfig

ParseStage = Callable[[str, Sequence[str]], Any]
TRAINING = ("pretrain", "distill")
#: Stages that are processes of their own: trainings handle signals and ranks, speed measures its memory.
PROCESSES = (*TRAINING, "speed")
_CROSS_ENTROPY_ALONE = {
    "kl_weight": 0.0,
    "ce_weight": 1.0,
    "hidden_weight": 0.0,
    "attention_weight": 0.0,
    "on_policy_fraction": 0.0,
}


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: As in ``--from``; also the folder of its output.
        command: The command of ``dualroute``, or "speed", which is the pipeline's own.
        arguments: All of them.
        options: {dotted key: value} of what they give, files read; the rest has its default.
        output: File or folder that is there when it is done.
        data: Folder or address of the shards that it reads.
        checkpoints: Run or checkpoint folders that it reads.
    """

    name: str
    command: str
    arguments: list[str]
    output: Path
    data: Path | str | None = None
    checkpoints: tuple[Path, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_training(self) -> bool:
        return self.command in TRAINING

    def program(self, launcher: list[str] | None = None) -> list[str]:
        """The command line."""
        if self.command == "speed":
            return [sys.executable, "-m", "dualroute.pipeline.speed", *self.arguments]
        start = launcher if launcher and self.is_training else [sys.executable, "-m", "dualroute"]
        return [*start, self.command, *self.arguments]


@dataclass
class Plan:
    """All stages in order, and the models on the way: {label: checkpoint or run folder}, parent first."""

    stages: list[Stage] = field(default_factory=list)
    models: dict[str, Path] = field(default_factory=dict)
    controls: dict[str, Path] = field(default_factory=dict)
    data: Path | str = Path()

    def names(self) -> list[str]:
        return [stage.name for stage in self.stages]


class Planner:
    """Fills in the paths.

    Args:
        config: What was asked for.
        parse_stage: (command, arguments) → configuration, to check a stage's options and learn prepare's
            output.
    """

    def __init__(self, config: PipelineConfig, parse_stage: ParseStage) -> None:
        self.config, self.parse_stage = config, parse_stage
        self.output = Path(config.output)
        self.plan = Plan()

    def make(self) -> Plan:
        """The plan.

        Raises:
            UserError: Options of a stage are wrong; the message names the stage.
        """
        config, plan = self.config, self.plan
        if config.prepare is not None:
            arguments = self.arguments("prepare", config.prepare)
            parsed = self.parse("prepare", "prepare", arguments)
            plan.data = Path(parsed.output)
            stage = Stage("prepare", "prepare", arguments, Path(parsed.output), options=_given(parsed))
            plan.stages.append(stage)
        else:
            plan.data = str(config.data)
        model = self.trained_model()
        plan.models["parent"] = model
        if config.prune is not None and config.recover is not None:
            model = self.pruned_and_recovered(model, config.prune, config.recover)
        if config.quantize is not None:
            self.add("quantize", "quantize", config.quantize, checkpoint=model)
            plan.models["quantized"] = self.output / "quantize"
        self.measurements()
        if config.export is not None:
            self.add("export", "export", config.export, checkpoint=model)
        return plan

    def trained_model(self) -> Path:
        """pretrain, and distil from a teacher where one is given."""
        config = self.config
        model = Path(str(config.parent))
        if config.pretrain is not None:
            model = self.add("pretrain", "pretrain", config.pretrain)
        if config.distill is not None:
            teacher = config.distill.get("teacher")
            if teacher is None:
                raise UserError("distill.teacher is missing: the model to learn from")
            model = self.add("distill", "distill", config.distill, init_from=model)
        return model

    def pruned_and_recovered(self, parent: Path, prune: dict[str, Any], recover: dict[str, Any]) -> Path:
        """The rounds of pruning, and what they are compared with."""
        config, plan, model = self.config, self.plan, parent
        keep = prune.get("keep")
        for number in range(1, config.rounds + 1):
            suffix = "" if config.rounds == 1 else f"-{number}"
            options = dict(prune)
            if keep is not None:
                options["keep"] = round(float(keep) ** (1 / config.rounds), 6)
            pruned = self.add(f"prune{suffix}", "prune", options, checkpoint=model)
            plan.models[f"pruned{suffix}"] = pruned
            model = self.add(f"recover{suffix}", "distill", recover, init_from=pruned, teacher=parent)
            plan.models[f"recovered{suffix}"] = model
        for control in config.controls:
            self.control(control, parent, prune, recover)
        return model

    def control(self, control: str, parent: Path, prune: dict[str, Any], recover: dict[str, Any]) -> None:
        """One run beside the recovery: the same data, steps and learning rate."""
        name = f"control-{control}"
        if control == "random":
            options = {**prune, "criterion": "random", "axis_report": False}
            # the shape that importance has chosen, so that only the choice of parts differs
            options.pop("keep", None)
            shape = self.output / ("prune" if self.config.rounds == 1 else f"prune-{self.config.rounds}")
            pruned = self.add(
                f"{name}-prune", "prune", {**options, "shape_of": str(shape)}, checkpoint=parent
            )
            path = self.add(name, "distill", recover, init_from=pruned, teacher=parent)
        else:
            start = parent
            if control == "cross_entropy":
                start = self.output / ("prune" if self.config.rounds == 1 else f"prune-{self.config.rounds}")
            options = {**recover, "distill": {**recover.get("distill", {}), **_CROSS_ENTROPY_ALONE}}
            path = self.add(name, "distill", options, init_from=start, teacher=parent)
        self.plan.controls[name] = path

    def measurements(self) -> None:
        """Loss and speed of every model on the way, and the loss of the controls."""
        plan, options = self.plan, self.config.evaluate
        for label, model in {**plan.models, **plan.controls}.items():
            file = self.output / "evaluate" / f"{label}.json"
            self.add(f"evaluate-{label}", "evaluate", options, checkpoint=model, output=file)
        for label, model in plan.models.items() if self.config.suite is not None else ():
            how: dict[str, Any] = {
                name: options[name] for name in ("batch_size", "device", "dtype") if name in options
            }
            file = self.output / "suite" / f"{label}.json"
            how["suite"] = self.config.suite
            self.add(f"suite-{label}", "evaluate", how, checkpoint=model, output=file)
        for label, model in plan.models.items():
            file = self.output / "speed" / f"{label}.json"
            arguments = [
                f"--checkpoint={model}", f"--output={file}",
                f"--tokens={self.config.decode_tokens}", f"--compile={int(self.config.compile)}",
                f"--sample_tokens={self.config.sample_tokens}",
                *(f"--prompt={prompt}" for prompt in self.config.prompts),
            ]  # fmt: skip
            plan.stages.append(Stage(f"speed-{label}", "speed", arguments, file, checkpoints=(model,)))

    def add(
        self,
        name: str,
        command: str,
        options: dict[str, Any],
        *,
        output: Path | None = None,
        **checkpoints: Path,
    ) -> Path:
        """Append a stage; its output."""
        output = output or self.output / name
        filled = {key: str(path) for key, path in checkpoints.items()} | {"output": str(output)}
        key = "data.path" if command in TRAINING else "data"
        wants_data = command != "export" or not ({"data", "text"} & options.keys())
        wants_data = wants_data and "suite" not in options  # which names its own
        if wants_data and command != "quantize":
            filled[key] = str(self.plan.data)
        reads = dict(checkpoints)
        teacher = options.get("teacher")
        if command == "distill" and teacher is not None and "teacher" not in reads:
            reads["teacher"] = Path(str(teacher))
        arguments = self.arguments(name, options, filled)
        given = _given(self.parse(name, command, arguments))
        self.plan.stages.append(
            Stage(name, command, arguments, output, self.plan.data, tuple(reads.values()), given)
        )
        return output

    def arguments(
        self, name: str, options: dict[str, Any], filled: dict[str, str] | None = None
    ) -> list[str]:
        """``--config`` files first, then single options, then what the pipeline fills in."""
        options = dict(options)
        files = options.pop("config", None) or []
        arguments = []
        for file in [files] if isinstance(files, str) else files:
            if not Path(file).is_file():
                raise UserError(f"{name}.config {file}: there is no file of that name")
            arguments.append(f"--config={file}")
        given = _flat(options)
        for key in given.keys() & (filled or {}).keys():
            raise UserError(f"{name}.{key} is filled in by the pipeline: leave it out")
        arguments += [f"--{key}={_text(value)}" for key, value in given.items()]
        arguments += [f"--{key}={value}" for key, value in (filled or {}).items()]
        return arguments

    def parse(self, name: str, command: str, arguments: list[str]) -> Any:
        try:
            return self.parse_stage(command, arguments)
        except UserError as error:
            raise UserError(f"stage {name}: {error}") from error


def _given(config: Any) -> dict[str, Any]:
    """{dotted key: value} of what a configuration was given, as JSON has it."""
    given = {}
    for key in sorted(config.given):
        value = config
        for word in key.split("."):
            value = getattr(value, word)
        given[key] = value
    return dict(json.loads(json.dumps(given)))


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"max_steps": 5}} → {"train.max_steps": 5}."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
