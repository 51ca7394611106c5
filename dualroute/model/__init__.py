"""The model: a plain PyTorch Transformer with DualRouting attention, no trainer in sight."""

from dualroute.model.config import ModelConfig
from dualroute.model.generate import SamplingConfig, generate
from dualroute.model.transformer import DualRoutingTransformer

__all__ = ["DualRoutingTransformer", "ModelConfig", "SamplingConfig", "generate"]
