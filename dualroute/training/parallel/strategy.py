"""From "this many processes, this ZeRO stage" to the Lightning strategy that trains so.

- In: a :class:`~dualroute.training.parallel.deepspeed_config.ParallelConfig` and the
  :class:`~dualroute.training.parallel.environment.World` of this process.
- Here: :func:`build_strategy` chooses one plain process, DDP or DeepSpeed;
  :class:`DualRouteDeepSpeedStrategy` is Lightning's DeepSpeed strategy, also on a CPU.
- Under ZeRO-3 ``sharded_weights.py`` divides a model while it gets its weights.
- Next: the Trainer gets the strategy; ``training/step/step_guard.py`` looks at each step before it is taken.

Stock Lightning divides the loss by the accumulation and DeepSpeed divides it again, so
with N micro-batches all gradients are N times too small.  Adam hides it; clipping, the gradient norm and SGD
do not.  Here DeepSpeed is asked not to divide.

DeepSpeed is imported when a strategy is built, not when this module is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy

from dualroute import compat
from dualroute.errors import UserError
from dualroute.training.checkpointing.publishing.capture import WeightsOfPartitions
from dualroute.training.checkpointing.state.file import StateFile
from dualroute.training.checkpointing.state.reader import TrainingState
from dualroute.training.checkpointing.state.safe_load import deepspeed_loads_safely, load_deepspeed_file
from dualroute.training.config import ParallelConfig
from dualroute.training.parallel.deepspeed_config import deepspeed_config, uses_nvme
from dualroute.training.parallel.environment import DualRouteEnvironment, World
from dualroute.training.parallel.loading import NamesTheState
from dualroute.training.parallel.matrix_pieces import refuse_copies, tell_pieces
from dualroute.training.parallel.reduction import mean_in_float32
from dualroute.training.parallel.sequence import SharedSequences
from dualroute.training.parallel.sharded_weights import InitialWeights, shard
from dualroute.training.step.optim.muon import MuonWithAdamW

__all__ = [
    "DualRouteDeepSpeedStrategy",
    "OneProcessStrategy",
    "ParallelConfig",
    "build_strategy",
    "shards_weights",
]


def build_strategy(
    config: ParallelConfig,
    world: World,
    *,
    micro_batch: int,
    accumulation: int = 1,
    gradient_clip: float | None = None,
    precision: str = "32-true",
    accelerator: str = "auto",
) -> Strategy:
    """The ``strategy`` argument of the Trainer, with the cluster environment inside (so give it no plugin).

    Give the Trainer also ``devices=world.local_world_size, num_nodes=world.num_nodes`` and the same
    ``accumulate_grad_batches``, ``gradient_clip_val``, ``precision`` and ``accelerator`` as here.  Raises
    UserError for contradictions and for a missing DeepSpeed.
    """
    name = config.strategy
    if name == "auto":
        name = "single" if world.world_size == 1 else "deepspeed"
    if name == "single" and world.world_size > 1:
        raise UserError(
            f"strategy=single, but {world.launcher} started {world.world_size} processes: "
            "use strategy=auto, or start one process"
        )
    if name != "deepspeed":
        _refuse_zero_without_deepspeed(config, name)
        if name == "single":
            return OneProcessStrategy(world, accelerator)
        ddp = DualRouteDDPStrategy(
            cluster_environment=DualRouteEnvironment(world),
            checkpoint_io=StateFile(),
            timeout=timedelta(minutes=config.timeout_minutes),
            reduce_in_float32=config.gradient_reduction == "fp32",
        )
        ddp.sequence_ranks = config.sequence_parallel
        return ddp
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    deepspeed = DualRouteDeepSpeedStrategy(
        deepspeed_config(
            config,
            micro_batch=micro_batch,
            accumulation=accumulation,
            gradient_clip=gradient_clip,
            precision=precision,
            on_cpu=on_cpu,
            world_size=world.world_size,
        ),
        world,
        on_cpu=on_cpu,
        timeout=timedelta(minutes=config.timeout_minutes),
    )
    deepspeed.sequence_ranks = config.sequence_parallel
    return deepspeed


class OneProcessStrategy(NamesTheState, SingleDeviceStrategy):
    """Lightning's strategy for one device, with our environment instead of one that Lightning would guess.

    Inside a Slurm allocation it would guess that `srun` was forgotten, and install a pre-emption handler.
    """

    def __init__(self, world: World, accelerator: str = "auto") -> None:
        super().__init__(device=_one_device(accelerator), checkpoint_io=StateFile())
        self.cluster_environment = DualRouteEnvironment(world)


def _one_device(accelerator: str) -> torch.device:
    # Apple's GPUs are never chosen: they have no float64, in which losses are summed
    on_cuda = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    return torch.device("cuda", 0) if on_cuda else torch.device("cpu")


class DualRouteDDPStrategy(NamesTheState, SharedSequences, DDPStrategy):
    """Lightning's DDP; ranks may share texts, and may sum gradients of 16 bits in float32.

    Args:
        reduce_in_float32: Do so; gradients that are float32 go as they are.
    """

    def __init__(self, *, reduce_in_float32: bool = False, **of_lightning: Any) -> None:
        super().__init__(**of_lightning)
        self.reduce_in_float32 = reduce_in_float32

    def configure_ddp(self) -> None:
        """Upstream; its own way to a hook exists on CUDA only."""
        super().configure_ddp()
        if self.reduce_in_float32:
            assert isinstance(self.model, torch.nn.parallel.DistributedDataParallel)
            self.model.register_comm_hook(None, mean_in_float32)


class DualRouteDeepSpeedStrategy(SharedSequences, DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, as it is on CUDA and made possible on a CPU.

    Args:
        config: from :func:`deepspeed_config`.
        world: from :func:`~dualroute.training.parallel.environment.detect_world`.
        on_cpu: train on the CPU (backend gloo) even if a GPU is there.
        timeout: of collectives.

    Raises:
        UserError: DeepSpeed is not installed, or libaio for parameters on NVMe.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        world: World,
        *,
        on_cpu: bool,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        if find_spec("deepspeed") is None:
            raise UserError("this needs DeepSpeed: pip install -e '.[deepspeed]'")
        if on_cpu:
            # DeepSpeed chooses its accelerator once, while it is imported.
            os.environ["DS_ACCELERATOR"] = "cpu"
            os.environ["LOCAL_SIZE"] = str(world.local_world_size)
        super().__init__(
            config=dict(config),
            cluster_environment=DualRouteEnvironment(world),
            process_group_backend="gloo" if on_cpu else None,
            exclude_frozen_parameters=True,  # they come from where they came from (training/finetuning)
            timeout=timeout,
        )
        self._state_of_parameters: Callable[[], TrainingState] | None = None
        if on_cpu:
            compat.spare_shared_memory_op()
        if config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1:
            compat.make_second_partition_once()
        if uses_nvme(config["zero_optimization"]):
            _check_libaio()

    @property
    def root_device(self) -> torch.device:
        if self._on_cuda or self.parallel_devices is None:
            return super().root_device
        return torch.device("cpu", 0)

    @property
    def _on_cuda(self) -> bool:
        return isinstance(self.accelerator, CUDAAccelerator)

    def setup_environment(self) -> None:
        """Upstream on CUDA.  On a CPU: numbered devices, then the step of DDP, which asks for no CUDA."""
        if self._on_cuda:
            super().setup_environment()
            return
        # Three places upstream want a device index; every process sees one CPU.
        self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices or [None]))]
        DDPStrategy.setup_environment(self)

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Upstream, what is built in here is divided; here :meth:`shard` does it, parameter by parameter."""
        yield

    def shard(self, module: torch.nn.Module, weights: InitialWeights, prefix: str) -> None:
        """Give ``module`` its weights divided among the ranks (ZeRO-3); see :func:`sharded_weights.shard`."""
        shard(module, weights, compat.complete_deepspeed_config(self), self.root_device, prefix)

    def expect_universal_checkpoint(self, state: Callable[[], TrainingState]) -> None:
        """What :meth:`load_checkpoint` will be given is the index of one; call it before ``fit``.

        Args:
            state: Opens what the parameters are read from.
        """
        self._state_of_parameters = state
        assert isinstance(self.config, dict)
        self.config["checkpoint"] = {**self.config.get("checkpoint", {}), "load_universal": True}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Upstream, without running code that a file of the checkpoint holds.

        Raises:
            UserError: A file cannot be read, holds such code, or is not what DeepSpeed wrote.
        """
        try:
            weights = WeightsOfPartitions(self.deepspeed_engine)
            with contextlib.ExitStack() as loading:
                if self._state_of_parameters is not None:
                    parameters, self._state_of_parameters = self._state_of_parameters(), None
                    loading.enter_context(
                        compat.read_partitions_from(self.deepspeed_engine.optimizer, parameters)
                    )
                loading.enter_context(deepspeed_loads_safely(weights))
                state = super().load_checkpoint(checkpoint_path, weights_only)
            weights.restore()
        except UserError:
            raise
        except (
            KeyError,
            IndexError,
            TypeError,
            AttributeError,
            ValueError,
            AssertionError,
            OSError,
        ) as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"{checkpoint_path} does not hold the training state that this run needs ({said}): use "
                f"another checkpoint"
            ) from error
        assert isinstance(self.config, dict)
        if self.config.get("checkpoint", {}).get("load_universal"):
            folder = Path(checkpoint_path) / "checkpoint"
            self._mend_universal_state(folder / "zero" / "optimizer_state.pt")
        return state

    def _mend_universal_state(self, path: Path) -> None:
        """At stage 3 DeepSpeed gives all groups the settings of the first, so norms would decay too.

        It also gives all of them one tensor as their count of steps, which each then raises by one, and a
        mean of squares, which Muon has not.
        """
        saved = load_deepspeed_file(path)["param_groups"]
        optimizer = self.deepspeed_engine.optimizer.optimizer
        for group, settings in zip(optimizer.param_groups, saved, strict=True):
            group.update(settings)
        for parameter, state in optimizer.state.items():
            state["step"] = state["step"].clone()
            if isinstance(optimizer, MuonWithAdamW) and optimizer.is_flat_matrices(parameter):
                state.pop("exp_avg_sq", None)

    def teardown(self) -> None:
        """Upstream, which wants to move the weights; those of a run that was refused before are nowhere."""
        module = self.lightning_module
        if module is not None and any(parameter.is_meta for parameter in module.parameters()):
            module.cpu = lambda: module  # type: ignore[method-assign]
        super().teardown()

    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Lightning has divided the loss by the accumulation already; DeepSpeed must not do it again."""
        return super().backward(closure_loss, optimizer, *args, **{"scale_wrt_gas": False, **kwargs})

    def _setup_model_and_optimizer(
        self, model: Any, optimizer: Any, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        """At stage 0 with fp32 parameters we clip, just before the step.

        DeepSpeed's own clipping fails there on a step that is skipped, which has no gradients (see
        ``step_guard.py``).  All ranks hold the whole, reduced gradient, so clipping needs no communication.
        """
        assert isinstance(self.config, dict)
        clip = float(self.config.get("gradient_clipping", 0.0))
        plain = self.config["zero_optimization"]["stage"] == 0 and not any(
            self.config.get(name, {}).get("enabled") for name in ("bf16", "fp16")
        )
        if isinstance(optimizer, MuonWithAdamW):
            refuse_copies(self.config["zero_optimization"]["stage"], plain)
        if plain:
            self.config["gradient_clipping"] = 0.0
        engine, wrapped = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        if plain and clip > 0:

            def clip_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(parameters, clip)

            wrapped.register_step_pre_hook(clip_gradients)
        if isinstance(optimizer, MuonWithAdamW):
            tell_pieces(optimizer, wrapped, self.root_device)
        return engine, wrapped


def _check_libaio() -> None:
    """DeepSpeed's own message names neither the library nor the package."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            "offload_param.device nvme needs libaio and its headers: apt-get install libaio-dev (elsewhere "
            "libaio-devel)"
        )


_OF_DEEPSPEED = ("zero_stage", "offload_optimizer", "offload_parameters", "deepspeed_config")
_HPZ = "zero_hpz_partition_size"  # 1 is none


def shards_weights(strategy: Strategy) -> bool:
    """Whether a model is to be built without weights, because the strategy divides them (ZeRO-3)."""
    return isinstance(strategy, DualRouteDeepSpeedStrategy) and bool(strategy.zero_stage_3)


def settings_without_effect(config: ParallelConfig, world: World) -> str | None:
    """What is said of DeepSpeed's settings in a run that one plain process trains; null without any."""
    given = [f"parallel.{key} {value}" for key, value in _given_of_deepspeed(config).items()]
    if config.strategy != "auto" or world.world_size > 1 or not given:
        return None
    return (
        f"{', '.join(given)} {'has' if len(given) == 1 else 'have'} no effect: parallel.strategy auto trains "
        f"one process without DeepSpeed; start several, or give --parallel.strategy deepspeed"
    )


def _given_of_deepspeed(config: ParallelConfig) -> dict[str, Any]:
    given = {key: getattr(config, key) for key in _OF_DEEPSPEED if getattr(config, key)}
    return given if config.zero_hpz_partition_size == 1 else given | {_HPZ: config.zero_hpz_partition_size}


def _refuse_zero_without_deepspeed(config: ParallelConfig, name: str) -> None:
    for key, value in _given_of_deepspeed(config).items():
        # With auto, a run file written for many ranks may be tried on one, which needs no sharding.
        if config.strategy != "auto":
            raise UserError(
                f"{key}={value} has no meaning with strategy={name}: use strategy=deepspeed, or remove it"
            )
