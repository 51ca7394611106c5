"""Low-rank adapters (LoRA, DoRA) by the package ``peft``: what of a model is trained beside its weights.

In: a model with the weights that it begins with.  Here: :func:`add_adapters` puts an adapter beside each
chosen linear layer, both routes' projections, the feed-forward and the head among them, and freezes all else
but the head of a task.  Out: to whoever publishes the model, :func:`merged_parameters`, ordinary weights
under ordinary names with the adapters added, and :func:`adapter_files`, the adapters alone in peft's own
format, under the names that layers have in an exported folder.

The head lends its weight to a loss instead of multiplying (``model/lm_head.py``), so its adapter is
added to the weight (:mod:`~dualroute.training.finetuning.adapted`).
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualroute.errors import UserError
from dualroute.model.lm_head import NextTokenHead
from dualroute.model.quantized import require_torchao
from dualroute.training.finetuning.adapted import (
    HEAD,
    NAME,
    adapted_layers,
    adapted_weight,
    is_adapter,
    is_base_layer,
    own_forward,
    own_name,
)
from dualroute.training.finetuning.config import StrategyConfig
from dualroute.training.finetuning.patterns import OF_TASK, chosen_layers

FOLDER = "adapter"  #: in a checkpoint
_OF_PEFT = "base_model.model."  #: what stands before a layer's name in peft's own files
_EXPORTED_HEAD = "lm_head"


def require_peft() -> Any:
    """The package.

    Raises:
        UserError: It is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("finetune.adapter needs peft: pip install -e '.[lora]'") from error
    if importlib.util.find_spec("torchao") is not None:  # peft imports it
        require_torchao("finetune.adapter")
    return peft


def targets(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the layers of ``model`` that ``patterns`` choose; a tied head is none of them.

    Raises:
        UserError: A pattern chooses nothing.
    """
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | NextTokenHead) and not name.startswith(OF_TASK)
    ]
    if model.config.head_is_tied:  # type: ignore[union-attr]
        linear.remove(HEAD)
    return chosen_layers(linear, patterns)


def add_adapters(model: nn.Module, config: StrategyConfig, seed: int) -> None:
    """Put adapters into ``model``, in place; they and the head of a task are all that is trained from now on.

    They begin without effect: one of their two matrices is zero.

    Args:
        model: With its weights.
        config: Kind, size and place of the adapters.
        seed: Of the matrix that is not zero; the same whatever was drawn before.

    Raises:
        UserError: See :func:`targets`.
    """
    peft = require_peft()
    chosen = targets(model, config.targets)
    head = model.head
    if HEAD in chosen:
        assert isinstance(head, NextTokenHead)
        rows, width = head.weight.shape
        linear = nn.Linear(width, rows, bias=False, device="meta")
        linear.weight = head.weight
        model.head = linear
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(_peft_config(config, chosen), model)
    own_forward(model, dora=config.adapter == "dora")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) or name.startswith(OF_TASK))
    model.adapter_config = config  # type: ignore[assignment]


def _peft_config(config: StrategyConfig, chosen: list[str]) -> Any:
    return require_peft().LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=chosen,
        use_dora=config.adapter == "dora",
        bias="none",
    )


def has_adapters(model: nn.Module) -> bool:
    """Whether :func:`add_adapters` has changed ``model``."""
    return getattr(model, "adapter_config", None) is not None


def merged_parameters(
    model: nn.Module,
) -> Iterator[tuple[str, list[nn.Parameter], Callable[[], Tensor]]]:
    """(name, what it is made of, its value) of each parameter of ``model`` with its adapters added, in order.

    The first of what a value is made of has its type and shape.  Values are made when they are asked for, one
    layer's at a time; all that they are made of has to be whole then (ZeRO-3).
    """
    layers = {f"{name}.base_layer.weight": layer for name, layer in adapted_layers(model).items()}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        layer = layers.get(name)
        if layer is None:
            yield own_name(name), [parameter], parameter.detach
        else:
            own = [p for of, p in layer.named_parameters() if is_adapter(f".{of}")]
            yield own_name(name), [parameter, *own], partial(_merged, layer)


@torch.no_grad()
def _merged(layer: nn.Module) -> Tensor:
    return adapted_weight(layer).to(layer.get_base_layer().weight.dtype)  # type: ignore[operator]


def adapter_files(model: nn.Module) -> dict[str, bytes]:
    """The adapters of ``model`` as peft writes them, by path in a checkpoint; none without adapters.

    ``PeftModel.from_pretrained(exported model, folder)`` reads them, where the export is of the weights that
    the run began with.
    """
    if not has_adapters(model):
        return {}
    from safetensors.torch import save

    config: StrategyConfig = model.adapter_config  # type: ignore[assignment]
    tensors = {
        f"{_OF_PEFT}{_exported(name).replace(f'.{NAME}.', '.')}": parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }
    tensors = {_as_saved(name): value for name, value in tensors.items()}
    described = _peft_config(config, _shortest(model))
    described.task_type = "CAUSAL_LM"
    described.inference_mode = True
    with tempfile.TemporaryDirectory() as scratch:
        described.save_pretrained(scratch)
        text = (Path(scratch) / "adapter_config.json").read_text(encoding="utf-8")
    return {
        f"{FOLDER}/adapter_config.json": f"{json.dumps(json.loads(text), indent=1)}\n".encode(),
        f"{FOLDER}/adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
    }


def _exported(name: str) -> str:
    """The name of a layer, or of what is in it, in an exported folder."""
    if name == HEAD or name.startswith(f"{HEAD}."):
        return f"{_EXPORTED_HEAD}{name.removeprefix(HEAD)}"
    return f"model.{name}"


def _as_saved(name: str) -> str:
    """peft writes the lengths of dora without the name of the parameter in them."""
    vector = "lora_magnitude_vector.weight"
    return name.removesuffix(".weight") if name.endswith(vector) else name


def _shortest(model: nn.Module) -> list[str]:
    """Last parts of the names of adapted layers where they mean the same layers, else the names in full."""
    adapted = set(adapted_layers(model))
    ends = {name.rpartition(".")[2] for name in adapted}
    alike = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | NextTokenHead)
        and name.rpartition(".")[2] in ends
        and not is_adapter(name)
        and not is_base_layer(name)
    }
    if not alike <= adapted:
        return sorted(map(_exported, adapted))
    return sorted(_EXPORTED_HEAD if end == HEAD else end for end in ends)
