"""The model: a plain PyTorch Transformer with DualRouting attention, no trainer in sight.

The names below are imported when they are first used: :class:`ModelConfig` alone needs no torch, so that
the command line can read a configuration, and print its help, at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualroute.model.config import ModelConfig
    from dualroute.model.decoding.generation import generate
    from dualroute.model.decoding.sampler import Sampler
    from dualroute.model.decoding.sampling_config import SamplingConfig
    from dualroute.model.transformer import DualRoutingTransformer

__all__ = ["DualRoutingTransformer", "ModelConfig", "Sampler", "SamplingConfig", "generate"]

_MODULES = {
    "ModelConfig": "config",
    "SamplingConfig": "decoding.sampling_config",
    "Sampler": "decoding.sampler",
    "generate": "decoding.generation",
    "DualRoutingTransformer": "transformer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
