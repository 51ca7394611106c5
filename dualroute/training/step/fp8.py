"""Linear layers whose products, forward and backward, are of 8-bit floats: ``train.precision: fp8``.

- In: a model that is about to be trained, and a run that is otherwise one of bf16-mixed.
- Here: torchao's float8 training (https://github.com/pytorch/ao), rowwise: each row of an operand is scaled
  to the range of float8 e4m3 by a power of two just before the product (Micikevicius et al. 2022,
  https://arxiv.org/abs/2209.05433).
- Out: the same parameters under the same names, float32 where bf16-mixed has float32; so a checkpoint is one
  of bf16-mixed, which loads without torchao.

Norms, router, attention, embedding, head and loss stay as they are in bf16-mixed, and so do the thin matrices
of adapters, beside weights that are multiplied so.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from dualroute.errors import UserError
from dualroute.model.quantized import require_torchao
from dualroute.training.config import PretrainConfig
from dualroute.training.finetuning.adapted import HEAD, is_adapter
from dualroute.training.parallel.deepspeed_config import asked_stage

#: Of both sizes of a weight, and of the tokens of a micro-batch: what the products of a GPU want.
MULTIPLE = 16
CAPABILITY = (8, 9)  # of the first GPUs that have them


def check_fp8(config: PretrainConfig) -> None:
    """Refuse a run that cannot be one of fp8.

    Raises:
        UserError: torchao is missing, the GPU has no fp8, or another setting stands against it.
    """
    train = config.train
    require_torchao("train.precision fp8")
    if torch.cuda.is_available():
        found = torch.cuda.get_device_capability()
        if found < CAPABILITY or torch.version.hip is not None:
            raise UserError(
                f"train.precision fp8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or "
                f"more and {torch.cuda.get_device_name()} has {found[0]}.{found[1]}: use bf16-mixed"
            )
    if train.quantization_aware is not None:
        raise UserError(
            "train.precision fp8 cannot be used with train.quantization_aware, which rounds the same weights "
            "otherwise: use bf16-mixed, or leave it out"
        )
    if asked_stage(config.parallel) == 3:
        raise UserError(
            "train.precision fp8 cannot be used with parallel.zero_stage 3: until the backward pass it would "
            "keep all the weights that are gathered; use stage 2, or bf16-mixed"
        )
    tokens = -(-config.data.context // config.parallel.sequence_parallel) * train.micro_batch
    if tokens % MULTIPLE:
        raise UserError(
            f"train.precision fp8 wants a multiple of {MULTIPLE} tokens in a rank's micro-batch, and "
            f"data.context {config.data.context} x train.micro_batch {train.micro_batch} gives {tokens}: "
            f"change one of them"
        )


def multiply_in_fp8(model: nn.Module) -> None:
    """Have the linear layers of ``model`` multiply 8-bit floats from now on; emulated without a GPU.

    Raises:
        UserError: None of them has sizes that the products take.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    on_cpu = not torch.cuda.is_available()
    recipe = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=on_cpu)
    taken: list[str] = []

    def takes(module: nn.Module, name: str) -> bool:
        if is_adapter(name) or name == f"{HEAD}.base_layer":  # thin matrices; what lends its weight
            return False
        fits = isinstance(module, nn.Linear) and not any(size % MULTIPLE for size in module.weight.shape)
        if fits:
            taken.append(name)
        return fits

    convert_to_float8_training(model, module_filter_fn=takes, config=recipe)
    if not taken:
        raise UserError(
            f"train.precision fp8 takes linear layers whose sizes are multiples of {MULTIPLE}, and the model "
            f"has none: change model.dim and model.ffn_dim, or use bf16-mixed"
        )
    if on_cpu:
        for name in taken:
            model.get_submodule(name).register_forward_pre_hook(_in_autocast_type)


def _in_autocast_type(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """torchao asks for the autocast of a GPU alone."""
    if torch.is_autocast_enabled("cpu"):
        return inputs[0].to(torch.get_autocast_dtype("cpu")), *inputs[1:]
    return inputs
