"""A model whose weights are integers: the modules that hold them, and how a checkpoint becomes one.

In: integers and scales that :mod:`dualroute.compress.quantize` wrote, under these names in
``model.safetensors``, with W ≈ qdata · scale; ``checkpoint.json`` says how in its key ``quantization``:

    NAME.qdata   (N, K) int8, or (N, K / 2) uint8: two 4-bit weights a byte, the even column in the low half
    NAME.scale   (N, 1) float32, one a row; or (N, K / group_size) bfloat16, one for each group of columns
    NAME.bias    (N,) float32, as it was, where the layer has one

Here: Linear, embedding and head are replaced by modules of the same interface, so whatever reads a model
reads this one.  A tied embedding is one table that serves the look-up and the head.  Weights that only a
GPU's kernels can read (``NATIVE``) stay tensors of torchao.

The scale is the only floating-point number here, so it says in which precision the
module computes.  ``model.to(torch.bfloat16)`` therefore does what it does for any other model.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualroute import compat
from dualroute.attention.backend import token_kernels
from dualroute.attention.backends.cpp import int8_product
from dualroute.errors import UserError
from dualroute.model.config import ModelConfig
from dualroute.model.frontends import Frontend
from dualroute.model.lm_head import NextTokenHead
from dualroute.model.quantization import NATIVE, Quantization
from dualroute.model.transformer import DualRoutingTransformer

Result = TypeVar("Result")


def require_torchao(what: str) -> None:
    """Refuse ``what`` where torchao is not installed; keep its notes off the terminal where it is.

    Raises:
        UserError: Saying how to install it.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"{what} needs torchao: pip install -e '.[compress]'")
    # it warns of extensions for other machines and of names that it still registers
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def pack_int4(values: Tensor) -> Tensor:
    """(N, K) int8 in [-8, 7] → (N, K / 2) uint8, the even column in the low half."""
    nibbles = (values + 8).to(torch.uint8)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_int4`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).to(torch.int8) - 8


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is int8 or int4; a bias stays what it was.

    Args:
        in_features: K.
        out_features: N.
        group_size: Columns that share a scale, for int4; null is int8 with a scale a row.
        dynamic: Round the activations of each token to int8 as well (symmetric, scale max|x| / 127.5).
        bias: Add one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group_size: int | None = None,
        dynamic: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.group_size, self.dynamic = group_size, dynamic
        self.qdata: Tensor
        self.scale: Tensor
        self.bias: Tensor | None
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.register_buffer("packed", None, persistent=False)  # see pack_for_cpu
        self.register_buffer("steps", None, persistent=False)
        self.packed: Tensor | None
        self.steps: Tensor | None
        if group_size is None:
            self.register_buffer("qdata", torch.empty(out_features, in_features, dtype=torch.int8))
            self.register_buffer("scale", torch.empty(out_features, 1))
        else:
            groups = in_features // group_size
            self.register_buffer("qdata", torch.empty(out_features, in_features // 2, dtype=torch.uint8))
            self.register_buffer("scale", torch.empty(out_features, groups, dtype=torch.bfloat16))

    def extra_repr(self) -> str:
        bits = 8 if self.group_size is None else 4
        return (
            f"{self.in_features}, {self.out_features}, bits={bits}, group_size={self.group_size}, "
            f"dynamic={self.dynamic}"
        )

    def pack_for_cpu(self) -> None:
        """Lay the weight out for a kernel of the CPU that reads it as it is stored; nothing is rounded.

        int4 for torch's own, any number of rows; int8 for that of :mod:`dualroute.attention.backends.cpp`, a
        single row.  Without effect on other devices and where there is no kernel for the shape.
        """
        if self.qdata.device.type != "cpu" or self.dynamic:
            return
        if self.group_size is None:
            self.packed = panels_for_cpu(self.qdata, self.scale)
        elif self.out_features % 16 == 0:
            values = unpack_int4(self.qdata).to(torch.int32) + 8
            self.packed = compat.int4_packed_for_cpu(values)
            scale = self.scale.t()  # (groups, N); the kernel computes (q - 8) * scale + zero
            self.steps = torch.stack([scale, torch.zeros_like(scale)], dim=-1).contiguous()

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (N, K) as floats."""
        if self.group_size is None:
            return self.qdata.to(dtype) * self.scale.to(dtype)
        groups = unpack_int4(self.qdata).unflatten(1, (-1, self.group_size))
        return (groups * self.scale.to(torch.float32)[..., None]).flatten(1).to(dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, K) → (…, N) in the dtype of the input."""
        product = self._product(hidden_states)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def _product(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        if self.packed is not None and self.steps is not None and self.group_size is not None:
            rows = compat.int4_product_on_cpu(
                hidden_states.reshape(-1, self.in_features),
                self.packed,
                self.group_size,
                self.steps.to(dtype),
            )
            return rows.reshape(*hidden_states.shape[:-1], -1)
        if self.group_size is not None:
            return F.linear(hidden_states, self.dequantized(dtype))
        if not self.dynamic:
            return scaled_product(hidden_states, self.qdata, self.scale, self.packed)
        rounded, step = round_tokens(hidden_states)
        product = integer_product(rounded, self.qdata)
        return (product * step * self.scale[:, 0].to(torch.float32)).to(dtype)


def panels_for_cpu(qdata: Tensor, scale: Tensor) -> Tensor | None:
    """An int8 weight laid out for the CPU's kernels; None where there are none, or torch's is faster."""
    kernels = token_kernels(scale)
    if kernels is None or not kernels.fast_int8_product():
        return None
    return kernels.int8_panels(qdata, scale)


def scaled_product(rows: Tensor, qdata: Tensor, scale: Tensor, panels: Tensor | None) -> Tensor:
    """(…, K) times int8 (N, K), transposed, times scale (N, 1) → (…, N) in the dtype of the rows.

    A single row reads ``panels``, if there are any.  The rest is written as torch's compiler looks for it:
    transposed first, then widened.  The other way round it widens the weights once for all and multiplies
    with floats.
    """
    one = rows.numel() == rows.shape[-1]
    if panels is not None and one and rows.dtype in (torch.bfloat16, torch.float32):
        return int8_product(rows.reshape(1, -1), panels, len(qdata)).reshape(*rows.shape[:-1], -1)
    product = torch.mm(rows.reshape(-1, rows.shape[-1]), qdata.t().to(rows.dtype))
    return (product * scale[:, 0].to(rows.dtype)).reshape(*rows.shape[:-1], -1)


def round_tokens(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(…, K) → int8 (…, K) and the float32 step (…, 1) of each token: rows ≈ int8 · step."""
    wide = rows.to(torch.float32)
    step = (wide.abs().amax(-1, keepdim=True) / 127.5).clamp_min(torch.finfo(torch.float32).eps)
    return (wide * (1.0 / step)).round().clamp(-128, 127).to(torch.int8), step


def integer_product(rows: Tensor, weight: Tensor) -> Tensor:
    """int8 (…, K) times int8 (N, K), transposed → float32 (…, N).

    On a CPU as a product of float32, exact while K · 128² < 2²⁴ and within 1e-6 beyond: torch's own int8
    product runs a reference loop there on most machines, hundreds of times slower.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    if flat.is_cuda and len(flat) > 16 and not (weight.shape[0] % 8 or weight.shape[1] % 8):
        product = compat.int8_product_on_cuda(flat, weight.t()).to(torch.float32)
    else:
        product = F.linear(flat.to(torch.float32), weight.to(torch.float32))
    return product.reshape(*rows.shape[:-1], -1)


class QuantizedTable(nn.Module):
    """A vocabulary in int8, one scale a row: looks up tokens, and lends its rows to the head."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.qdata: Tensor
        self.scale: Tensor
        self.register_buffer("qdata", torch.empty(rows, dim, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(rows, 1))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The whole table (V, dim) as floats."""
        return self.qdata.to(dtype) * self.scale.to(dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(…) ids → (…, dim)."""
        rows, scale = F.embedding(input_ids, self.qdata), F.embedding(input_ids, self.scale)
        return rows.to(scale.dtype) * scale


class QuantizedHead(nn.Module):
    """Projection onto the vocabulary by a table, the embedding's where they are tied."""

    def __init__(self, table: QuantizedTable) -> None:
        super().__init__()
        self.table = table
        self.register_buffer("packed", None, persistent=False)
        self.packed: Tensor | None

    def pack_for_cpu(self) -> None:
        """See :meth:`QuantizedLinear.pack_for_cpu`."""
        if self.table.qdata.device.type == "cpu":
            self.packed = panels_for_cpu(self.table.qdata, self.table.scale)

    def forward(
        self, hidden_states: Tensor, project: Callable[[Tensor, Tensor], Result] | None = None
    ) -> Tensor | Result:
        """Logits (…, V), or ``project(hidden_states, weight)`` as in :class:`NextTokenHead`."""
        if project is not None:
            return project(hidden_states, self.table.dequantized(hidden_states.dtype))
        return scaled_product(hidden_states, self.table.qdata, self.table.scale, self.packed)


def quantizable(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Name and module of every layer that a scheme applies to."""
    for name, module in model.named_modules():
        if is_quantizable(module):
            yield name, module


def is_quantizable(module: nn.Module) -> bool:
    """Linear layers; not what enters a model with a frontend, a few columns in which rounding shows most."""
    return isinstance(module, nn.Linear) and not isinstance(module, Frontend)


def replace_modules(model: DualRoutingTransformer, quantization: Quantization) -> None:
    """Put empty quantised modules in the place of those with float weights, on the same device."""
    for name, linear in list(quantizable(model)):
        if quantization.scheme in NATIVE:
            continue
        module = QuantizedLinear(
            linear.in_features,
            linear.out_features,
            group_size=quantization.group_size,
            dynamic=quantization.scheme == "int8_dynamic",
            bias=linear.bias is not None,
        )
        model.set_submodule(name, module.to(linear.weight.device))
    if quantization.embeddings and model.config.frontend is None:
        vocab_size, dim = model.embedding.weight.shape
        device = model.embedding.weight.device
        table = QuantizedTable(vocab_size, dim).to(device)
        own = table if model.config.head_is_tied else QuantizedTable(vocab_size, dim).to(device)
        model.embedding, model.head = table, QuantizedHead(own)  # type: ignore[assignment]
    model.requires_grad_(False)


def stored_tensors(model: DualRoutingTransformer) -> dict[str, Tensor]:
    """Every tensor that a checkpoint of a quantised model holds, tied ones once."""
    tensors = dict(model.state_dict())
    if model.config.head_is_tied:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("head.")}
    return tensors


def assemble(
    config: ModelConfig, weights: Mapping[str, Tensor], said: Mapping[str, Any], source: str
) -> DualRoutingTransformer:
    """The model of a quantised checkpoint, in evaluation mode.

    Args:
        config: Its shape.
        weights: What ``source`` holds.
        said: The entry ``quantization`` of its ``checkpoint.json``.
        source: The file, for messages.

    Raises:
        UserError: Names or shapes do not fit, the scheme is unknown, or torchao is missing.
    """
    try:
        quantization = Quantization(**said)
    except TypeError as error:
        raise UserError(f"{source} was quantised by another version of dualroute ({error})") from error
    with torch.device("meta"):
        model = DualRoutingTransformer(config)
    replace_modules(model, quantization)
    if quantization.tensors is not None:
        weights = _native_tensors(weights, quantization.tensors, source)
    expected = {name: tuple(value.shape) for name, value in stored_tensors(model).items()}
    for name in sorted(expected.keys() | weights.keys()):
        found = tuple(weights[name].shape) if name in weights else None
        if expected.get(name) != found:
            raise UserError(
                f"{source} does not fit its model.json and scheme {quantization.scheme}: {name} is "
                f"{found or 'absent'} there, {expected.get(name) or 'absent'} by the configuration: "
                f"quantize the float checkpoint again"
            )
    for name, value in weights.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        is_parameter = leaf in module._parameters
        setattr(module, leaf, nn.Parameter(value, requires_grad=False) if is_parameter else value)
    if config.head_is_tied and isinstance(model.head, NextTokenHead):
        model.head.weight = model.embedding.weight
    return model.eval()


def _native_tensors(
    weights: Mapping[str, Tensor], described: dict[str, str], source: str
) -> dict[str, Tensor]:
    require_torchao(f"{source} (its scheme is one of {', '.join(NATIVE)})")
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    tensors, left = unflatten_tensor_state_dict(dict(weights), described)
    if left:
        raise UserError(f"{source} holds tensors that checkpoint.json does not describe: {sorted(left)}")
    return tensors
