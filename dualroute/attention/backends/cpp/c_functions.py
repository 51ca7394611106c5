"""The operators' functions in C, as torch's compiler wants to be told of them.

In: torch_ops.h. Out: `C_FUNCTIONS`, for the option `aot_inductor.custom_ops_to_c_shims`. A program compiled
with it calls them without the dispatcher.

The compiler keeps its programs on disk by all of its options, and cannot write operators
down. So this dictionary is written as their names.
"""

from __future__ import annotations

from typing import Any

import torch

from dualroute.attention.backends.cpp import decode, int8_product  # noqa: F401  they define the operators


class _Functions(dict[Any, list[str]]):
    def __deepcopy__(self, memo: dict[int, Any]) -> _Functions:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (sorted((str(operator), *declared) for operator, declared in self.items()),)


_TENSOR, _POINTER, _INTEGER = "AtenTensorHandle", "AtenTensorHandle*", "int64_t"


def _declared(name: str, *arguments: str) -> list[str]:
    return [f"AOTITorchError aoti_torch_cpu_{name}({', '.join([*arguments, _POINTER])})"]


C_FUNCTIONS = _Functions(
    {
        torch.ops.dualroute.decode_layer.default: _declared(
            "decode_layer", *[_TENSOR] * 3, *[_POINTER] * 2, _TENSOR, *[_INTEGER] * 4
        ),
        torch.ops.dualroute.int8_product.default: _declared("int8_product", _TENSOR, _TENSOR, _INTEGER),
    }
)
