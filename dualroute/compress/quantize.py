"""``dualroute quantize``: a trained checkpoint in, one of a quarter or an eighth of its size out.

In: a checkpoint with float weights.  Here: torchao (https://github.com/pytorch/ao) chooses scales and
integers for every linear layer, for the embedding and for the head; what it finds is put into the modules of
:mod:`dualroute.model.quantized`.  Out: a checkpoint folder that ``evaluate`` and ``generate`` take like any
other.

The embedding counts.  In a small model it is a third of all weights, and left in float
it alone keeps the file above a quarter of its size, whatever happens to the layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualroute.compress.config import QuantizeConfig
from dualroute.errors import UserError
from dualroute.evaluate.load import choose_device
from dualroute.model import DualRoutingTransformer
from dualroute.model.checkpoint.format import (
    TOKENIZER,
    WEIGHTS,
    Checkpoint,
    find_checkpoint,
    load_model,
    refuse_quantized,
    save_model,
    verify_checkpoint,
)
from dualroute.model.checkpoint.lineage import derived
from dualroute.model.quantization import NATIVE, Quantization
from dualroute.model.quantized import (
    QuantizedLinear,
    QuantizedTable,
    is_quantizable,
    pack_int4,
    quantizable,
    replace_modules,
    require_torchao,
    stored_tensors,
)

INT4 = getattr(torch, "int4")  # noqa: B009 - which torch's stubs do not know


def check_possible(scheme: str, device: torch.device) -> None:
    """Refuse a scheme that the device has no kernels for.

    Raises:
        UserError: Naming scheme and device, and what works there.
    """
    if scheme not in NATIVE:
        return
    instead = "int8_weight_only" if scheme == "float8_dynamic" else "int4_weight_only"
    if device.type != "cuda":
        raise UserError(
            f"scheme {scheme} needs a CUDA device and this would run on '{device}': use {instead} here"
        )
    capability = torch.cuda.get_device_capability(device)
    least = (8, 9) if scheme == "float8_dynamic" else (8, 0)
    if capability < least:
        raise UserError(
            f"scheme {scheme} needs compute capability {least[0]}.{least[1]} and {device} has "
            f"{capability[0]}.{capability[1]}: use {instead} here"
        )


def check_widths(model: nn.Module, group_size: int | None) -> None:
    """Refuse a group that does not divide the width of a layer.

    Raises:
        UserError: Naming the first such layer, its width, and a group that divides all widths.
    """
    if group_size is None:
        return
    widths = {name: linear.in_features for name, linear in quantizable(model)}
    for name, width in widths.items():
        if width % group_size:
            fitting = [size for size in (256, 128, 64, 32) if not any(w % size for w in widths.values())]
            remedy = f"use --group_size {fitting[0]}" if fitting else "use an int8 scheme"
            raise UserError(
                f"{name} has {width} columns, which --group_size {group_size} does not divide: {remedy}"
            )


def torchao_config(quantization: Quantization) -> Any:
    """torchao's configuration of a scheme for linear layers."""
    from torchao import quantization as ao

    if quantization.scheme == "float8_dynamic":
        return ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    if quantization.scheme == "int4_tile_packed":
        assert quantization.group_size is not None
        return ao.Int4WeightOnlyConfig(
            group_size=quantization.group_size, int4_packing_format="tile_packed_to_4d"
        )
    if quantization.scheme == "int4_weight_only":
        assert quantization.group_size is not None
        return ao.IntxWeightOnlyConfig(
            weight_dtype=INT4,
            granularity=ao.PerGroup(quantization.group_size),
            scale_dtype=torch.bfloat16,
        )
    return rows_config()


def rows_config() -> Any:
    """torchao's configuration of int8 with one scale a row."""
    from torchao import quantization as ao

    return ao.Int8WeightOnlyConfig(granularity=ao.PerRow(), set_inductor_config=False)


@torch.no_grad()
def quantize_model(model: DualRoutingTransformer, quantization: Quantization) -> DualRoutingTransformer:
    """The model with quantised weights in place of its own; it is changed in place and returned.

    Raises:
        UserError: torchao is missing, or the group size fits a layer badly.
    """
    require_torchao(f"scheme {quantization.scheme}")
    check_widths(model, quantization.group_size)
    from torchao.quantization import quantize_

    if quantization.scheme in NATIVE:
        model.to(torch.bfloat16)  # what their kernels multiply with
    quantize_(model, torchao_config(quantization), lambda module, _: is_quantizable(module))
    biases = {name: linear.bias for name, linear in quantizable(model) if linear.bias is not None}
    found = {}  # of each module to come, what torchao chose
    if quantization.scheme not in NATIVE:
        found = {name: _integers(linear.weight) for name, linear in quantizable(model)}
    if quantization.embeddings and model.config.frontend is None:
        tables: dict[str, nn.Module] = {"embedding": model.embedding}
        if not model.config.head_is_tied:
            tables["head"] = model.head
        chosen = set(tables.values())
        quantize_(model, rows_config(), lambda module, _: module in chosen)
        for name, module in tables.items():
            path = name if name == "embedding" else "head.table"
            found[path] = _integers(module.weight)
    replace_modules(model, quantization)
    for name, (qdata, scale) in found.items():
        module = model.get_submodule(name)
        assert isinstance(module, QuantizedLinear | QuantizedTable)
        module.qdata, module.scale = qdata, scale
        if isinstance(module, QuantizedLinear) and module.bias is not None:
            module.bias = biases[name].detach().clone()
    return model


def _integers(weight: Any) -> tuple[Tensor, Tensor]:
    """Integers and scales of a tensor of torchao, packed as :mod:`dualroute.model.quantized` wants them."""
    is_int4 = getattr(weight, "target_dtype", torch.int8) == INT4
    qdata = pack_int4(weight.qdata) if is_int4 else weight.qdata
    return qdata.contiguous(), weight.scale.reshape(len(qdata), -1).contiguous()


def save_quantized(
    model: DualRoutingTransformer, quantization: Quantization, source: Checkpoint, output: str | Path
) -> Checkpoint:
    """Write a checkpoint of quantised weights, without pickle.

    Raises:
        UserError: ``output`` exists already, or cannot be written.
    """
    tensors, described = stored_tensors(model), quantization.to_dict()
    if quantization.scheme in NATIVE:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        plain = {name: value.detach() for name, value in tensors.items()}
        tensors, described["tensors"] = flatten_tensor_state_dict(plain)
    metadata: dict[str, Any] = {
        name: source.metadata[name]
        for name in ("step", "context", "train_loss", "val_loss", "data_fingerprint")
        if name in source.metadata
    }
    metadata |= derived(source, "quantize")
    metadata |= {"quantization": described, "source": str(source.folder)}
    return save_model(model, output, source.folder / TOKENIZER, metadata, source.task_file(), tensors)


def quantize(config: QuantizeConfig) -> Checkpoint:
    """``dualroute quantize``: write the quantised checkpoint and say what it saves.

    Raises:
        UserError: The device cannot run the scheme, the checkpoint is quantised already, or the group size
            does not fit.
    """
    device = choose_device(config.device)
    check_possible(config.scheme, device)
    require_torchao(f"scheme {config.scheme}")
    source = find_checkpoint(config.checkpoint)
    refuse_quantized(source, "it cannot be quantized again; give the checkpoint it was made from")
    if Path(config.output).exists():
        raise UserError(f"--output {config.output} exists already: choose another folder")
    verify_checkpoint(source, only=TOKENIZER)  # it is copied
    model = load_model(source).to(device, torch.float32)
    quantization = config.quantization
    quantize_model(model, quantization)
    written = save_quantized(model, quantization, source, config.output)
    before = (source.folder / WEIGHTS).stat().st_size
    after = (written.folder / WEIGHTS).stat().st_size
    print(
        f"{config.output}: {config.scheme}, {after / 1e6:,.2f} MB instead of {before / 1e6:,.2f} MB "
        f"({before / after:.2f} times smaller)"
    )
    return written
