"""``dualroute submit``: from the configuration of a run to a job in Slurm's queue.

- In: the same YAML files that ``dualroute pretrain``, ``distill`` and ``pipeline`` read, and the resources.
- Here: the configuration is checked for that many processes, so that a mistake shows now and not after a
  night in the queue; a template of ``slurm/`` is filled in and kept as ``OUTPUT/slurm/*.sbatch``.
- Next: ``sbatch``; on the nodes ``srun`` starts ``dualroute pretrain``, which finds its place in the world
  from Slurm's variables (``training/parallel/environment.py``) and stops when Slurm says so
  (``training/resilience/preemption.py``); after a stall the script asks Slurm to run it again
  (``training/resilience/requeue.py``).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from dualroute.cli.aliases import say
from dualroute.cli.family import Parser
from dualroute.cli.submit.scripts import check_names, common_values, hand_to_slurm, joined, quoted, render
from dualroute.configuration.shipped import find_config
from dualroute.data.manifest import MANIFEST_FILE, Manifest
from dualroute.errors import UserError
from dualroute.pipeline.stages import Planner

ParseStage = Callable[[str, Sequence[str]], Any]
"""``dualroute.cli.parse_stage``: (stage, arguments) → the stage's configuration."""

EXAMPLES = """
  dualroute submit pretrain --config configs/pretrain/1b.yaml --nodes 4 --gpus_per_node 8 --time 24:00:00
  dualroute submit finetune --config configs/pretrain/finetune.yaml --nodes 2 -- --init_from runs/1b
  dualroute submit finetune --config configs/task/sst2.yaml --gpus_per_node 1 -- --init_from runs/1b
  dualroute submit sweep    --config lr-1.yaml lr-2.yaml lr-3.yaml --gpus_per_node 8 --max_parallel 2
  dualroute submit distill  --config configs/distill/books_5m.yaml --nodes 2 -- --init_from runs/pruned
  dualroute submit pipeline --prepare prepare.yaml --config pretrain.yaml --dry-run
  dualroute submit pipeline --config configs/pipeline/books_5m.yaml --gpus_per_node 8
  dualroute submit pretrain --config configs/pretrain/1b.yaml -- --train.max_steps 100
"""


def build_parser() -> argparse.ArgumentParser:
    """Options of ``dualroute submit``."""
    parser = Parser(
        "dualroute submit",
        description="A job for Slurm from the configuration of a run.",
        epilog=f"examples:{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("kind", choices=[*KINDS], help="one run; an array of runs; a chain of stages")
    add("--config", nargs="+", action="extend", default=[], metavar="FILE",
        help="of the kind's command; several are merged, in a sweep each is a run of pretrain")  # fmt: skip
    add("--prepare", metavar="FILE",
        help="pipeline: of dualroute prepare, for the short chain prepare → pretrain → evaluate, in which "
             "--config is of dualroute pretrain")  # fmt: skip
    add("--nodes", type=int, default=1)
    add("--gpus_per_node", type=int, default=0, help="0 trains on CPUs")
    add("--tasks_per_node", type=int, help="processes per node; default: one per GPU, else one")
    add("--cpus_per_task", type=int, help="cores of each process")
    add(
        "--time",
        default="24:00:00",
        help="limit of one start; a requeued job gets it anew (default 24:00:00)",
    )
    add("--stall_requeues", type=int, default=3, metavar="N",
        help="run the job again after a stall or the death of a rank, at most N times without a newer "
             "checkpoint since the last one (default 3, 0 never)")  # fmt: skip
    add("--partition")
    add("--account")
    add("--qos")
    add("--sbatch", action="append", default=[], metavar="OPTION",
        help="any other option of sbatch, as in --sbatch=--constraint=a100; may be repeated")  # fmt: skip
    add("--max_parallel", type=int, help="sweep: runs at the same time")
    add("--template", type=Path, help="your copy of slurm/pretrain.sbatch or slurm/sweep.sbatch")
    add("--dry_run", action="store_true", help="print the scripts and submit nothing")
    return parser


def submit(arguments: Sequence[str], parse_stage: ParseStage) -> int:
    """Check, render, submit.

    Raises:
        UserError: The configuration is wrong for these resources, or Slurm refused the job.
    """
    mine, overrides = list(arguments), []
    if "--" in mine:
        mine, overrides = mine[: mine.index("--")], mine[mine.index("--") + 1 :]
    try:
        options = build_parser().parse_args(mine)
    except SystemExit as done:  # after --help
        return int(done.code or 0)
    if not options.config:
        raise UserError("give the configuration of the run: --config FILE")
    options.tasks_per_node = options.tasks_per_node or max(options.gpus_per_node, 1)
    for name in ("nodes", "tasks_per_node", "cpus_per_task", "max_parallel"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}: it must be at least 1")
    if options.stall_requeues < 0:
        raise UserError(f"--stall_requeues is {options.stall_requeues}: it must be 0 (never) or more")
    _check_time(options.time)
    check_names(options)
    scripts = KINDS[options.kind](options, overrides, parse_stage)
    if options.dry_run:
        print("\n".join(text for text in scripts.values()), end="")
        return 0
    for path, text in scripts.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"the script {path} cannot be written: {error.strerror or error}") from error
    hand_to_slurm(list(scripts))
    return 0


def _check_time(text: str) -> None:
    """The forms that sbatch knows; long enough that the signal does not come before the first step."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text, re.ASCII)
    if match is None:
        raise UserError(f"--time {text}: write minutes, HH:MM:SS or D-HH:MM:SS")
    days, first, second, third = (int(part or 0) for part in match.groups())
    hours = match[1] is not None or match[4] is not None  # else the first number is minutes
    minutes = days * 1440 + (first * 60 + second + third / 60 if hours else first + second / 60)
    if minutes < 5:
        raise UserError(
            f"--time {text} is under 5 minutes: Slurm asks for a stop up to 3 minutes before the end, "
            "and the job would be requeued without end"
        )


# -- what is submitted: {path of the script: its text}, in the order of the chain ----------------------------

Scripts = dict[Path, str]


def _pretrain(options: argparse.Namespace, overrides: list[str], parse_stage: ParseStage) -> Scripts:
    arguments = [*_configs(options.config), *overrides]
    is_task = options.kind == "finetune" and _names_a_task(options.config, overrides)
    stage = "finetune" if is_task else "distill" if options.kind == "distill" else "pretrain"
    config = _checked(options, arguments, parse_stage, stage)
    if options.kind == "finetune" and not is_task and config.init_from is None:
        raise UserError(
            "without a section `task`, fine-tuning is a pretraining that begins with a model: set init_from, "
            "append `-- --init_from CHECKPOINT`, or name the task (configs/task)"
        )
    if not is_task:  # whose data are rows, which the run itself reads
        _check_data(options, config.data)
    return _training_job(options, config, arguments, stage, options.kind)


def _names_a_task(configs: Sequence[str], overrides: Sequence[str]) -> bool:
    """Whether `dualroute finetune` is meant, and not a pretraining that begins with a model."""
    if any(word.startswith("--task.") for word in overrides):
        return True
    for file in configs:
        try:
            content = yaml.safe_load(find_config(file).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            continue  # the stage's own parser says what is wrong with it
        if isinstance(content, dict) and "task" in content:
            return True
    return False


def _training_job(
    options: argparse.Namespace,
    config: Any,
    arguments: list[str],
    stage: str = "pretrain",
    name: str = "pretrain",
) -> Scripts:
    folder = Path(config.output).resolve()
    values = common_values(options, folder.name, folder / "slurm", "%x-%j.out") | {
        "ARGUMENTS": joined(arguments),
        "COMMAND": f'"${{launch[@]}}" {stage} {joined(arguments)}',
        "OUTPUT": quoted(str(folder)),
    }
    return {folder / "slurm" / f"{name}.sbatch": render("pretrain.sbatch", values, options.template)}


def _sweep(options: argparse.Namespace, overrides: list[str], parse_stage: ParseStage) -> Scripts:
    of_output: dict[Path, str] = {}
    for file in options.config:
        config = _checked(options, [*_configs([file]), *overrides], parse_stage)
        _check_data(options, config.data)
        output = Path(config.output).resolve()
        if output in of_output:
            raise UserError(
                f"{file} and {of_output[output]} both have output {config.output}: give each its own"
            )
        of_output[output] = file
    folder = next(iter(of_output)).parent / "slurm"
    limit = f"%{options.max_parallel}" if options.max_parallel else ""
    values = common_values(options, "sweep", folder, "%x-%A_%a.out") | {
        "ARRAY": f"0-{len(of_output) - 1}{limit}",
        "CONFIGS": "\n".join(f"    {quoted(str(find_config(file).resolve()))}" for file in options.config),
        "OUTPUTS": "\n".join(f"    {quoted(str(output))}" for output in of_output),
        "ARGUMENTS": joined(overrides),
    }
    return {folder / "sweep.sbatch": render("sweep.sbatch", values, options.template)}


def _pipeline(options: argparse.Namespace, overrides: list[str], parse_stage: ParseStage) -> Scripts:
    if options.prepare is None:
        return _stages_of_pipeline(options, overrides, parse_stage)
    arguments = [*_configs(options.config), *overrides]
    config = _checked(options, arguments, parse_stage)
    made = parse_stage("prepare", _configs([options.prepare])).output
    if Path(made).resolve() != Path(config.data.path).resolve():
        raise UserError(
            f"{options.prepare} writes the data to {made}, the run reads data.path {config.data.path}: "
            "make both the same"
        )
    folder = Path(config.output).resolve()
    figures = ["--checkpoint", config.output, "--data", config.data.path]
    stages = {
        "prepare": _configs([options.prepare]),
        "evaluate": [*figures, "--output", str(folder / "evaluation.json")],
    }
    scripts = {}
    for stage, of_stage in stages.items():
        values = common_values(
            options, f"{folder.name}-{stage}", folder / "slurm", "%x-%j.out", training=False
        )
        values |= {"STAGE": stage, "ARGUMENTS": joined(of_stage)}
        scripts[stage] = {folder / "slurm" / f"{stage}.sbatch": render("stage.sbatch", values)}
    return scripts["prepare"] | _training_job(options, config, arguments) | scripts["evaluate"]


def _stages_of_pipeline(
    options: argparse.Namespace, overrides: list[str], parse_stage: ParseStage
) -> Scripts:
    """A job for each training of ``dualroute pipeline``, and one for all stages between two of them."""
    arguments = [*_configs(options.config), *overrides]
    try:
        config = parse_stage("pipeline", arguments)
    except UserError as error:
        raise UserError(f"{error} (without --prepare, --config is of dualroute pipeline)") from error
    plan = Planner(config, parse_stage).make()
    folder = Path(config.output).resolve()
    scripts: Scripts = {}
    names: list[str] = []

    def add(run: Path | None = None) -> None:  # the folder of a training
        words = [*arguments, "--only", ",".join(names)]
        values = common_values(
            options, f"{folder.name}-{names[0]}", folder / "slurm", "%x-%j.out", training=run is not None
        )
        if run is not None:
            command = f"{values['PYTHON']} -m dualroute pipeline {joined(words)}"
            launcher = """--launcher "$(printf '%q ' "${launch[@]}")\""""
            values |= {"ARGUMENTS": "", "COMMAND": f"{command} {launcher}"}
            values |= {"OUTPUT": quoted(str(run.resolve()))}
            text = render("pretrain.sbatch", values, options.template)
        else:
            values |= {"STAGE": "pipeline", "ARGUMENTS": joined(words)}
            text = render("stage.sbatch", values)
        scripts[folder / "slurm" / f"{len(scripts) + 1:02d}-{names[0]}.sbatch"] = text
        names.clear()

    for stage in plan.stages:
        if stage.is_training:
            if names:
                add()
            _checked(options, stage.arguments, parse_stage, stage.command)
            names.append(stage.name)
            add(stage.output)
        else:
            names.append(stage.name)
    names.append("report")
    add()
    return scripts


KINDS = {
    **dict.fromkeys(("pretrain", "finetune", "distill"), _pretrain),
    "sweep": _sweep,
    "pipeline": _pipeline,
}


def _configs(files: Sequence[str]) -> list[str]:
    return [word for file in files for word in ("--config", str(find_config(file).resolve()))]


def _check_data(options: argparse.Namespace, data: Any) -> None:
    """The shards must be there when a job is submitted; to look at its script they need not."""
    for folder in [source.path for source in data.sources] or [data.path]:
        if options.dry_run and not (Path(folder) / MANIFEST_FILE).is_file():
            say(f"there are no shards in {folder} yet: `dualroute prepare` makes them")
            continue
        Manifest.load(folder)


def _checked(
    options: argparse.Namespace, arguments: Sequence[str], parse_stage: ParseStage, stage: str = "pretrain"
) -> Any:
    """The run's configuration, sound for as many processes as are asked for."""
    # these import torch, which --help does without
    from dualroute.data.plan import derive_accumulation
    from dualroute.training.parallel.deepspeed_config import deepspeed_config
    from dualroute.training.parallel.environment import World
    from dualroute.training.parallel.sequence import check_sequence_parallel

    config = parse_stage(stage, arguments)
    train = config.train
    world = World(world_size=options.nodes * options.tasks_per_node)
    groups = check_sequence_parallel(config.parallel.sequence_parallel, world, config.model)
    steps = derive_accumulation(train.tokens_per_batch, config.data.context, train.micro_batch, groups)
    strategy = config.parallel.strategy
    if strategy == "deepspeed" or (strategy == "auto" and world.world_size > 1):
        deepspeed_config(
            config.parallel,
            micro_batch=train.micro_batch,
            accumulation=steps,
            gradient_clip=config.optim.grad_clip,
            precision=train.mixed_precision,
            world_size=world.world_size,
        )
    return config
