"""``dualroute estimate``: memory per GPU, longest context, times, hours and cost, before a GPU is booked.

- In: the same configuration as ``dualroute pretrain`` reads, and the machines in mind.
- Here: weights, gradients, optimizer states and what the layers keep for their backward passes are counted
  from shapes (``training/memory/parts.py``); the longest context is what the rest of the memory has room for.
  Times are sums of assumptions (``estimate/times.py``).
- Next: ``estimate/recommend.py`` says which settings would fit, or be faster; ``dualroute pretrain`` trains
  with them, and says after its second step what it has really used.

Nothing in it grows faster than the context.  Routed attention keeps its inputs, its output and a few numbers
a token, so twice the memory means twice the context.  No torch is imported, so that it answers at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from dualroute.data.manifest import MANIFEST_FILE, Manifest
from dualroute.errors import UserError, one_line, printable
from dualroute.estimate.config import EstimateConfig, with_hardware
from dualroute.estimate.recommend import advise
from dualroute.estimate.times import Times, accumulation, times
from dualroute.files import read_limited, require_regular
from dualroute.model.config import ModelConfig
from dualroute.model.cost.flops import Flops, training_flops
from dualroute.model.cost.shapes import numel, parameter_shapes
from dualroute.paths import is_remote
from dualroute.training.memory.parts import GIB, Memory, activation_bytes, memory_of
from dualroute.training.memory.trained import Count, counted
from dualroute.training.parallel.divide import check_divides

#: Where neither the configuration nor the data say: that of configs/prepare/fineweb_edu.yaml.
USUAL_VOCABULARY = 32_000
_MOST_CONTEXT = 2**40


@dataclass
class Estimate:
    """Bytes are those of one GPU.

    Attributes:
        config: With the vocabulary and the numbers of the machine.
        count: Of the parameters.
        memory: At the peak of a step.
        kept_per_token: Bytes that all layers together keep.
        work_per_token: Of the layer whose backward pass is running.
        longest_context: Tokens of one text, micro_batch 1; 0 where not even the model fits.
        flops: Of a token.
        flops_per_token: Router and summary included; no gradient of weights that are not trained.
        times: Of a step and a checkpoint.
        checkpoints: Of the run.
        hours: Of the run.
        mfu: That follows: model FLOPs over what the peak would do in the time of a step.
    """

    config: EstimateConfig
    count: Count
    memory: Memory
    kept_per_token: float
    work_per_token: float
    longest_context: int
    flops: Flops
    flops_per_token: float
    times: Times
    checkpoints: int
    hours: float
    mfu: float

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.count.held

    @property
    def trained(self) -> int:
        """Those that have gradients and an optimizer."""
        return self.count.trained

    @property
    def weights(self) -> float:
        """Bytes."""
        return self.memory.weights

    @property
    def gradients(self) -> float:
        """Bytes."""
        return self.memory.gradients

    @property
    def optimizer(self) -> float:
        """Bytes."""
        return self.memory.optimizer

    @property
    def second_partition(self) -> float:
        """Bytes."""
        return self.memory.second_partition

    @property
    def states(self) -> float:
        """Bytes that do not depend on the context."""
        return self.memory.states

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.memory.total <= room(self.config)

    @property
    def cost(self) -> float | None:
        """Of the run; null where no price is known."""
        price = self.config.price
        return None if price is None else price * self.config.gpus * self.hours


def room(config: EstimateConfig) -> float:
    """Bytes of a GPU that may be used."""
    return config.gpu_memory * GIB * (1 - config.headroom)


def estimate(config: EstimateConfig) -> Estimate:
    """Count.

    Raises:
        UserError: The data or a file are damaged, or ranks, heads and batch do not divide.
    """
    config = _with_vocabulary(with_hardware(config))
    count = counted(config)
    fixed = Fixed.of(config, count)
    result = estimated(config, fixed)
    result.longest_context = _longest(config, fixed)
    return result


@dataclass
class Fixed:
    """What stays as it is while settings of one run are tried.

    Attributes:
        count: Of the parameters.
        model: Resolved.
        flops: Of a token.
        teacher: Its shape, if there is one.
        of_teacher: FLOPs of a token in its forward pass.
        divides: (ranks, GPUs) that were found to divide.
    """

    count: Count
    model: ModelConfig
    flops: Flops
    teacher: ModelConfig | None
    of_teacher: float
    teacher_parameters: int
    divides: set[tuple[int, int]]

    @classmethod
    def of(cls, config: EstimateConfig, count: Count) -> Fixed:
        """Of a run."""
        model, context = count.model, config.data.context
        teacher = None if config.teacher is None else _teacher(Path(config.teacher), config)
        of_teacher = 0.0 if teacher is None else training_flops(teacher, context).total / 3
        held = 0 if teacher is None else sum(map(numel, parameter_shapes(teacher).values()))
        return cls(count, model, training_flops(model, context), teacher, of_teacher, held, set())

    def check(self, ranks: int, gpus: int) -> None:
        """Refuse ranks that do not divide.

        Raises:
            UserError: Naming what does not.
        """
        if (ranks, gpus) not in self.divides:
            check_divides(ranks, gpus, self.model)
            self.divides.add((ranks, gpus))


def estimated(config: EstimateConfig, fixed: Fixed) -> Estimate:
    """Of a configuration that is complete, but for the longest context; see :func:`estimate`."""
    fixed.check(config.parallel.sequence_parallel, config.gpus)
    accumulation(config)
    count, flops, model = fixed.count, fixed.flops, fixed.model
    of_teacher = _teacher_bytes(config, fixed)
    memory = memory_of(config, config.gpus, config.device, of_teacher, count)
    kept, work = activation_bytes(config, count, config.gpus)
    spent = flops.total - 2.0 * count.frozen_matrices  # no gradient of theirs
    took = times(config, model, count.held, spent + fixed.of_teacher, count.trained)
    steps = config.train.total_steps
    checkpoints = -(-steps // config.checkpoint.every_steps)
    hours = (steps * took.step + checkpoints * took.checkpoint) / 3600
    of_model = flops.of_model - 2.0 * count.frozen_matrices
    mfu = of_model * config.train.tokens_per_batch / (config.gpus * config.peak_tflops * 1e12 * took.step)
    return Estimate(config, count, memory, kept, work, 0, flops, spent, took, checkpoints, hours, mfu)


def _longest(config: EstimateConfig, fixed: Fixed) -> int:
    """Tokens of one text that fit, micro_batch 1."""
    train = dataclasses.replace(config.train, micro_batch=1)

    def fits(context: int) -> bool:
        data = dataclasses.replace(config.data, context=context)
        tried = dataclasses.replace(config, data=data, train=train)
        teacher = _teacher_bytes(tried, fixed)
        return memory_of(tried, config.gpus, config.device, teacher, fixed.count).total <= room(config)

    low, high = 0, 1
    while high < _MOST_CONTEXT and fits(high):
        low, high = high, high * 2
    while high - low > max(1, low // 4096):  # to a thousandth or so
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _with_vocabulary(config: EstimateConfig) -> EstimateConfig:
    """With the vocabulary of the data, or one of the usual size while there are none."""
    if config.model.vocab_size is not None:
        return config
    folder, size = config.data.path, USUAL_VOCABULARY
    if is_remote(folder) or (Path(folder) / MANIFEST_FILE).is_file():
        size = Manifest.load(folder, config.data.remote).tokenizer.vocab_size
    else:
        print(
            printable(
                f"there are no shards in {folder} yet: a vocabulary of {size:,} is assumed "
                f"(--model.vocab_size gives another)"
            )
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def _teacher(path: Path, config: EstimateConfig) -> ModelConfig:
    """The shape of a teacher: of a checkpoint, of a run's newest one, or in a YAML file.

    Raises:
        UserError: It cannot be read.
    """
    if path.is_dir():
        newest = sorted((path / "checkpoints").glob("step-*/model.json"))
        return ModelConfig.from_file(newest[-1] if newest else path / "model.json").resolved()
    require_regular(path, "teacher")
    try:
        values = yaml.safe_load(read_limited(path, 2**18))
        if not isinstance(values, dict):
            raise TypeError("it holds no table of keys and values")
        return ModelConfig(**{"vocab_size": config.model.vocab_size, **values}).resolved()
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"teacher {path} is no shape of a model: {one_line(str(error))}") from error


def _teacher_bytes(config: EstimateConfig, fixed: Fixed) -> float:
    """Weights, and while it runs the states of one layer: no gradient keeps more."""
    teacher, held = fixed.teacher, fixed.teacher_parameters
    if teacher is None:
        return 0.0
    size = 4.0 if config.teacher_dtype == "float32" else 2.0
    tokens = config.data.context * config.train.micro_batch / config.parallel.sequence_parallel
    return size * (held + tokens * (3 * max(teacher.ffn_dims) + 2 * teacher.dim))


def estimate_command(config: EstimateConfig) -> None:
    """Print the estimate as two tables, of memory and of time, and what would be better."""
    result = estimate(config)
    config = result.config
    title = f"{config.gpus:,} GPU(s) of {config.gpu_memory:g} GiB: estimates, not measurements"
    console = Console()
    for head, rows in (("memory per GPU", _memory(config, result)), ("time", _time(config, result))):
        table = Table(head, "", title=title)
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)
    fixed = Fixed.of(config, result.count)
    advice = advise(config, result, lambda changed: estimated(changed, fixed))
    console.print(advice.line, soft_wrap=True, highlight=False, markup=False)


def _memory(config: EstimateConfig, result: Estimate) -> dict[str, str]:
    memory, frozen = result.memory, result.trained < result.parameters
    trained = {"of these trained": f"{result.trained / 1e6:,.1f} M"} if frozen else {}
    names = {
        "weights": memory.weights,
        "second partition of the weights": memory.second_partition,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        f"activations, {config.train.micro_batch} x {config.data.context:,} tokens": memory.activations,
        "logits and gradients of the loss": memory.logits,
        "teacher": memory.teacher,
        "buffers of the libraries, assumed": memory.buffers,
        "fragmentation, assumed": memory.fragmentation,
    }
    optional = ("second partition of the weights", "teacher")
    sizes = {name: size for name, size in names.items() if size or name not in optional}
    return {
        "parameters": f"{result.parameters / 1e6:,.1f} M",
        **trained,
        **{name: f"{size / GIB:.2f} GiB" for name, size in sizes.items()},
        "in all": f"{memory.total / GIB:.2f} GiB" + ("" if result.fits else "  DOES NOT FIT"),
        "longest context, micro_batch 1": f"{result.longest_context:,} tokens",
    }


def _time(config: EstimateConfig, result: Estimate) -> dict[str, str]:
    """Each part of a step, with what is assumed of it."""
    took, parallel, flops = result.times, config.parallel, result.flops
    of_a_run = 100 * result.checkpoints * took.checkpoint / 3600 / result.hours
    seconds = {
        f"arithmetic, assumed at {config.mfu:.0%} of {config.peak_tflops:g} TFLOP/s": took.arithmetic,
        f"launches, {config.launches_forward} + {config.launches_backward} a layer of "
        f"{config.launch_microseconds:g} us": took.launches,
        f"gradients and weights, {config.network_bandwidth:g} GB/s between nodes, {config.node_bandwidth:g} "
        f"inside": took.gradients_and_weights,
        f"of that not behind {config.overlap:.0%} of the arithmetic": took.waited,
    }
    if parallel.sequence_parallel > 1:
        seconds[f"texts among {parallel.sequence_parallel} ranks"] = took.texts
    parts = {name: value for name, value in vars(flops).items() if value}
    shares = ", ".join(f"{name.replace('_', ' ')} {value / flops.total:.0%}" for name, value in parts.items())
    tokens = config.train.total_steps * config.train.tokens_per_batch
    optimal = config.tokens_per_parameter * result.trained
    cost = {} if result.cost is None else {f"cost, {config.price:g} a GPU and hour": f"{result.cost:,.2f}"}
    return {
        "training FLOPs per token": f"{result.flops_per_token / 1e9:,.2f} G",
        "of these": shares,
        "micro-steps of a step": f"{took.micro_steps:,}",
        **{name: f"{value:.3f} s" for name, value in seconds.items()},
        "one step": f"{took.step:.3f} s",
        "model FLOPs utilisation that follows": f"{result.mfu:.1%}",
        f"one checkpoint, {config.storage_bandwidth:g} GB/s in all, {config.rank_bandwidth:g} a rank": (
            f"{took.checkpoint:.1f} s"
        ),
        f"{config.train.total_steps:,} steps and {result.checkpoints:,} checkpoints ({of_a_run:.0f} %)": (
            f"{result.hours:,.1f} hours"
        ),
        **cost,
        f"tokens; compute-optimal are {config.tokens_per_parameter:g} a parameter": (
            f"{tokens / 1e9:,.3g} G, {tokens / optimal:.2g} x the {optimal / 1e9:,.3g} G of these"
        ),
    }
