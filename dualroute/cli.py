"""The door: ``dualroute STAGE --config FILE --key.sub value``.

One command per stage.  Every option is a field of that stage's dataclass, so the YAML keys, the flags and
the attribute names in the code are the same words.  Later sources win: defaults, then ``--config`` files in
the order given, then flags.  ``--print_config`` shows the result and stops.

Only the parser of the stage that was asked for is built, because importing them all
takes seconds.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from dualroute import __version__
from dualroute.errors import UserError
from dualroute.settings import note_given
from dualroute.training.resilience import stop_signal

#: stage → (module that holds it, its configuration class, its function, one line of help)
STAGES = {
    "prepare": ("data_prep.prepare", "PrepareConfig", "prepare", "corpus → tokenizer → shards"),
    "pretrain": ("dualroute.training.run", "PretrainConfig", "run_pretraining", "shards → trained model"),
    "evaluate": (
        "dualroute.evaluate.perplexity",
        "EvaluateConfig",
        "evaluate_command",
        "loss of a checkpoint",
    ),
    "generate": ("dualroute.evaluate.sample", "GenerateConfig", "generate_command", "text from a checkpoint"),
    "report": ("dualroute.training.monitoring.report", "ReportConfig", "report", "one page on a run"),
    "convert": (
        "dualroute.compress.convert",
        "ConvertConfig",
        "convert_command",
        "a model from elsewhere, or dense → dual attention",
    ),
    "distill": (
        "dualroute.distillation.run",
        "DistillConfig",
        "run_distillation",
        "shards and a teacher → trained student",
    ),
    "cache-logits": (
        "dualroute.distillation.cache_logits",
        "CacheLogitsConfig",
        "cache_logits",
        "a teacher's likeliest tokens, written once for distill",
    ),
    "prune": ("dualroute.compress.prune", "PruneConfig", "prune", "trained model → smaller model"),
    "sparsify": (
        "dualroute.compress.sparsify",
        "SparsifyConfig",
        "sparsify",
        "single weights to zero (research)",
    ),
    "quantize": (
        "dualroute.compress.quantize",
        "QuantizeConfig",
        "quantize",
        "weights of a checkpoint in int8, int4 or float8",
    ),
    "export": (
        "dualroute.export.command",
        "ExportConfig",
        "export_command",
        "a checkpoint for transformers, onnxruntime or torch.export",
    ),
    "pipeline": (
        "dualroute.pipeline.run",
        "PipelineConfig",
        "run_pipeline",
        "all stages, from text to a model that ships",
    ),
    "estimate": (
        "dualroute.estimate",
        "EstimateConfig",
        "estimate_command",
        "memory, longest context and hours of a run",
    ),
    "doctor": ("dualroute.doctor.command", "DoctorConfig", "doctor", "can this machine train?"),
}
CHECKPOINT_SUMMARY = "list, verify, export or convert checkpoints"


class StageParser(ArgumentParser):
    """Reports one line that names the key, the file it stands in and the nearest valid key."""

    arguments: Sequence[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        line = " ".join(message.split())
        raise UserError(self._with_hints(line)) from ex

    def _with_hints(self, line: str) -> str:
        unknown = re.search(r"does not accept option '([\w.]+)'|unrecognized arguments: --([\w.]+)", line)
        known = re.search(r'Parser key "([\w.]+)"', line)
        if unknown:
            return self._unknown(unknown.group(1) or unknown.group(2), "")
        if known:
            key, rest = known.group(1), line[known.end() + 1 :]
            rest = re.sub(r"\s*Expected an? <class '(\w+)'>\.", r" expected \1,", rest)
            rest = re.sub(r"\s*Expected an? typing\.Literal\[([^\]]*)\]\.", r" expected one of \1,", rest)
            return f"{key}{self._where(key)}:{rest.replace('Got value:', 'got')}"
        return line

    def _known_keys(self) -> Iterator[str]:
        for action in self._actions:
            if action.dest not in ("help", "print_config"):
                yield action.dest

    def _where(self, key: str) -> str:
        for path in _config_files(self.arguments):
            for given, where in _given_keys(_read_yaml(path), path):
                if given == key:
                    return f" in {where}"
        return ""

    def check_files(self) -> None:
        """Look at every ``--config`` file before it is merged, while it is still known what came from where.

        Raises:
            UserError: A file cannot be read, or a key in it does not exist.
        """
        known = set(self._known_keys())
        for path in _config_files(self.arguments):
            values = _read_yaml(path)
            if values is not None and not isinstance(values, dict):
                raise UserError(f"{path} holds no table of keys and values")
            for key, where in _given_keys(values, path):
                if key not in known and not any(
                    key.startswith(f"{name}.") for name in known - self._groups()
                ):
                    raise UserError(self._unknown(key, f" in {where}"))

    def _groups(self) -> set[str]:
        """Keys that hold other keys, such as ``model``."""
        return {key.rsplit(".", 1)[0] for key in self._known_keys() if "." in key}

    def _unknown(self, key: str, where: str) -> str:
        near = _nearest(key, (name for name in self._known_keys() if name != "config"))
        return f"unknown key '{key}'{where}" + (f"; did you mean '{near}'?" if near else "")


def _nearest(key: str, keys: Iterable[str]) -> str | None:
    """The valid key most like ``key``: by the whole dotted name, else by its last word."""
    keys = list(keys)
    close = difflib.get_close_matches(key, keys, 1, cutoff=0.7)
    if not close:
        last = {name.rsplit(".", 1)[-1]: name for name in keys}
        close = [
            last[word] for word in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, 1, cutoff=0.6)
        ]
    return close[0] if close else None


def _config_files(arguments: Sequence[str]) -> Iterator[Path]:
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=False):
        name, _, inline = flag.partition("=")
        if name == "--config":
            yield Path(inline or value)


def _read_yaml(path: Path) -> Any:
    """Content of a YAML file; a UserError names the file and the line that is wrong."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        problem = " ".join(str(error).replace('"<unicode string>", ', "").split())
        raise UserError(f"{path} is not valid YAML: {problem}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error


def _given_keys(values: Any, path: Path, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Dotted keys of a configuration, each with the file it stands in; ``model: other.yaml`` is followed."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield f"{prefix}{key}", path
            yield from _given_keys(value, path, f"{prefix}{key}.")
    elif isinstance(values, str) and values.endswith((".yaml", ".yml")) and prefix:
        other = path.parent / values
        if other.is_file():
            yield from _given_keys(_read_yaml(other), other, prefix)


def stage_parser(stage: str) -> StageParser:
    """The parser of one stage; its options are the fields of the stage's dataclass."""
    module, config_class, _, summary = STAGES[stage]
    parser = StageParser(prog=f"dualroute {stage}", description=summary)
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file with any of the options below; may be repeated."
    )
    parser.add_class_arguments(getattr(importlib.import_module(module), config_class), sub_configs=True)
    return parser


def _plain_switches(parser: StageParser, arguments: Sequence[str]) -> list[str]:
    """``--smoke`` and ``--no-smoke`` for an option that is true or false, beside ``--smoke true``."""
    switches = {action.dest for action in parser._actions if getattr(action, "_typehint", None) is bool}
    plain = []
    for flag, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        name = flag.removeprefix("--")
        if name.startswith("no-") and name.removeprefix("no-") in switches:
            flag = f"--{name.removeprefix('no-')}=false"
        elif flag.startswith("--") and name in switches and following.startswith("--"):
            flag = f"{flag}=true"
        plain.append(flag)
    return plain


def parse_stage(stage: str, arguments: Sequence[str]) -> Any:
    """Configuration object of ``stage`` from command-line arguments.

    Raises:
        UserError: An unknown key, a value of the wrong type, or values that contradict each other.
    """
    parser = stage_parser(stage)
    parser.arguments = arguments = _plain_switches(parser, arguments)
    parser.check_files()
    namespace = parser.parse_args(list(arguments))
    configured = parser.instantiate(namespace).as_dict()
    configured.pop("config", None)
    config = getattr(importlib.import_module(STAGES[stage][0]), STAGES[stage][1])(**configured)
    note_given(config, parser.parse_args(list(arguments), defaults=False).keys())
    return config


def checkpoint_command(arguments: Sequence[str]) -> int:
    """``dualroute checkpoint COMMAND``; returns the exit status.

    Raises:
        UserError: A command or option that does not exist, or whatever the command finds.
    """
    commands = importlib.import_module("dualroute.training.checkpointing.commands")
    parser = StageParser(prog="dualroute checkpoint", description=CHECKPOINT_SUMMARY)
    choices = parser.add_subcommands(dest="command")
    functions = {"list": commands.list_checkpoints, "verify": commands.verify,
                 "export": commands.export, "convert": commands.convert}  # fmt: skip
    for name, function in functions.items():
        command = StageParser(description=function.__doc__.splitlines()[0])
        first, *others = inspect.signature(function).parameters.values()
        command.add_argument(first.name, type=str, help="Checkpoint folder, or run folder.")
        for option in others:
            if option.default is inspect.Parameter.empty:
                command.add_argument(f"--{option.name}", type=str, required=True, help="Folder to write.")
            else:
                hints = get_type_hints(function)
                command.add_argument(f"--{option.name}", type=hints[option.name], default=option.default)
        choices.add_subcommand(name, command)
    chosen = parser.parse_args(list(arguments))
    return functions[chosen.command](**chosen[chosen.command].as_dict())


def pipeline_command(arguments: Sequence[str]) -> int:
    """``dualroute pipeline``; paths of its stages' files start at the folder of its own."""
    from dualroute.pipeline.run import run_pipeline

    renamed = {"--from": "--from_stage", "--dry-run": "--dry_run"}
    arguments = [
        word for given in arguments for name, sign, value in [given.partition("=")]
        for word in [renamed.get(name, name) + sign + value]
    ]  # fmt: skip
    files = list(_config_files(arguments))
    base = files[-1].parent if files else Path()
    return run_pipeline(parse_stage("pipeline", arguments), base, parse_stage, run_or_explain)


def run(arguments: Sequence[str]) -> int:
    """Run the stage that ``arguments`` name and return the exit status; see :func:`main`."""
    stage, *rest = arguments
    if stage == "submit":
        from dualroute.submit import submit

        return submit(rest, parse_stage)
    if stage == "checkpoint":
        return checkpoint_command(rest)
    if stage not in STAGES:
        near = _nearest(stage, [*STAGES, "submit", "checkpoint"])
        hint = f"; did you mean '{near}'?" if near else f"; choose one of {', '.join(STAGES)}"
        raise UserError(f"unknown stage '{stage}'{hint}")
    if stage == "pipeline":
        return pipeline_command(rest)
    config = parse_stage(stage, rest)
    status = getattr(importlib.import_module(STAGES[stage][0]), STAGES[stage][2])(config)
    return status if isinstance(status, int) else 0


def usage() -> str:
    """Text of ``dualroute --help``."""
    lines = [f"  {stage:<12} {summary}" for stage, (_, _, _, summary) in STAGES.items()]
    lines.append(f"  {'checkpoint':<12} {CHECKPOINT_SUMMARY}")
    return "\n".join(
        [
            "usage: dualroute STAGE [--config FILE] [--key value ...]",
            "",
            *lines,
            "  submit       a training, a sweep or a chain of stages as jobs of Slurm",
            "",
            "dualroute STAGE --help lists a stage's options; --print_config shows them after merging.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """What the ``dualroute`` command does; returns the exit status (2: the user can mend it)."""
    if arguments is None:
        arguments = sys.argv[1:]
        if arguments[:1] in (["pretrain"], ["distill"]):
            stop_signal.install()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"dualroute {__version__}")
        return 0
    return run_or_explain(arguments)


def run_or_explain(arguments: Sequence[str]) -> int:
    """:func:`run`, with one line on stderr for what the user can mend."""
    try:
        return run(arguments)
    except UserError as error:
        # a DataLoader's worker wraps the line in its own traceback; the line is the last one
        line = str(error).strip().splitlines()[-1]
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"dualroute {arguments[0]}: error{rank}: {line}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
